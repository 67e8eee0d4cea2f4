# vLLM's official image with the wheel from dist/ in it. vLLM finds the plugin by itself.
#   make wheels ARGS="--python 3.12 --architecture x86_64"
#   docker build -f docker/vllm.Dockerfile -t vllm-fastshard .
FROM vllm/vllm-openai:v0.33.0
RUN --mount=type=bind,source=dist,target=/dist pip install --no-cache-dir --no-deps --no-index --find-links /dist fastshard
