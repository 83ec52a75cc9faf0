# syntax=docker/dockerfile:1
# The quantizer: quantization-aware training and export.
# Build from the root of the repository:
#   docker build -f deploy/docker/quantizer.Dockerfile -t granq-quantizer:0.1.0 .
ARG PYTHON_VERSION=3.11
ARG DEBIAN=bookworm

FROM python:${PYTHON_VERSION}-slim-${DEBIAN} AS builder
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
# g++ compiles the quantizer's CPU kernels; it stays in this stage.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv==0.13.9 && uv venv /opt/granq
WORKDIR /source
# Dependencies come before sources: this layer changes with pyproject.toml alone.
COPY pyproject.toml ./
# Empty: PyTorch as PyPI has it, with CUDA on x86-64. cpu: from PyTorch's own index, without CUDA and far smaller.
ARG TORCH_BACKEND=
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/granq --requirements pyproject.toml --extra quantizer --extra s3 \
    ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"}
COPY README.md hatch_build.py ./
COPY protos protos
COPY granq granq
COPY services services
# The build hook generates the stubs; its compiler stays in uv's build environment.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv build --wheel --out-dir /wheel \
    && uv pip install --python /opt/granq --no-deps /wheel/*.whl \
    && uv pip check --python /opt/granq

FROM python:${PYTHON_VERSION}-slim-${DEBIAN}
# A number, so that Kubernetes can see that it is not root; an entry in passwd, since libraries look up the user's name.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin granq \
    && install --directory --owner=10001 --group=10001 /data
COPY --from=builder /opt/granq /opt/granq
# The root file system may be read-only: state goes to /data, everything else that is written to /tmp.
ENV PATH=/opt/granq/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    GRANQ_HOST=0.0.0.0 \
    GRANQ_LOG_FORMAT=json \
    GRANQ_ARTIFACT_URL=file:///data/artifacts \
    GRANQ_DATASET_ROOT=/data/datasets \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /data
# gRPC, metrics
EXPOSE 50052 51052
# No HEALTHCHECK: Kubernetes ignores it and asks the gRPC health service by its own probes (see deploy/kubernetes).
ENTRYPOINT ["python", "-m", "services.quantizer"]
