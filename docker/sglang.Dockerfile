# SGLang's official image with fastshard in it. SGLang finds the plugin by itself.
#   docker build -f docker/sglang.Dockerfile -t sglang-fastshard .
FROM lmsysorg/sglang:v0.5.23
RUN pip install --no-cache-dir --no-deps fastshard
