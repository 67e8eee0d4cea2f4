# Builds the wheel from this checkout and puts it into vLLM's image: nothing of the compiler is left in the image.
#   docker build -f docker/from-source.Dockerfile -t vllm-fastshard .
#   docker build -f docker/from-source.Dockerfile --build-arg IMAGE=lmsysorg/sglang:v0.5.23 -t sglang-fastshard .
ARG IMAGE=vllm/vllm-openai:v0.33.0
FROM ${IMAGE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${IMAGE}
RUN --mount=from=build,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl
ENTRYPOINT ["fastshard", "serve"]
