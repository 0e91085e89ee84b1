# The gateway alone: no torch, no Ray, no vLLM. From the repository's root:
#   docker build -f docker/gateway.Dockerfile -t folkmoot-gateway .
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY folkmoot folkmoot
RUN python -m venv /folkmoot \
    && /folkmoot/bin/pip install --no-cache-dir --constraint constraints.txt ".[otel]" \
    && /folkmoot/bin/pip uninstall --yes pip setuptools

FROM python:3.11-slim
COPY --from=build /folkmoot /folkmoot
ENV PATH=/folkmoot/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin folkmoot
USER 10001:10001
EXPOSE 50051
ENTRYPOINT ["python", "-m", "folkmoot.gateway"]
