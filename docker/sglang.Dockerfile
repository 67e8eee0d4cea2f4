# SGLang's official image with the wheel from dist/ in it. SGLang finds the plugin by itself.
#   make wheels ARGS="--python 3.12 --architecture x86_64"
#   docker build -f docker/sglang.Dockerfile -t sglang-fastshard .
FROM lmsysorg/sglang:v0.5.23
RUN --mount=type=bind,source=dist,target=/dist pip install --no-cache-dir --no-deps --no-index --find-links /dist fastshard
