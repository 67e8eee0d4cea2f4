# vLLM's official image with fastshard in it. vLLM finds the plugin by itself.
#   docker build -f docker/vllm.Dockerfile -t vllm-fastshard .
FROM vllm/vllm-openai:v0.33.0
RUN pip install --no-cache-dir --no-deps fastshard
