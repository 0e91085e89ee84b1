# Ray's pods: expert router, engines, expert hosts. From the repository's root:
#   docker build -f docker/cluster.Dockerfile -t folkmoot:cpu .
#   docker build -f docker/cluster.Dockerfile -t folkmoot:gpu --build-arg EXTRA=gpu .
FROM python:3.11-slim AS build
ARG EXTRA=cpu
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY folkmoot folkmoot
# A CPU build of torch from PyTorch's own index, as in the Makefile; uv reads pyproject.toml's overrides.
RUN python -m venv /folkmoot \
    && /folkmoot/bin/pip install --no-cache-dir uv==0.13.9 \
    && if [ "$EXTRA" = cpu ]; then export UV_TORCH_BACKEND=cpu; fi \
    && /folkmoot/bin/uv pip install --no-cache --python /folkmoot/bin/python --constraint constraints.txt ".[$EXTRA]"

FROM python:3.11-slim
# bash and wget: KubeRay starts Ray, and looks after it, with them. A C compiler: Triton needs one when it runs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends bash wget gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /folkmoot /folkmoot
ENV PATH=/folkmoot/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --create-home --home-dir /home/folkmoot --shell /bin/bash folkmoot
USER 10001:10001
WORKDIR /home/folkmoot
