# syntax=docker/dockerfile:1
# The evaluator for a Jetson: builds engines with the TensorRT of its JetPack, and runs them. arm64, no PyTorch.
# Build on the Jetson (or on any arm64 machine), from the root of the repository:
#   docker build -f deploy/docker/jetson.Dockerfile -t granq-evaluator-jetson:0.1.0 .
#
# An engine runs with the version that built it, so the base must have the TensorRT of the devices' JetPack:
#   JetPack 6.1, 6.2 (Orin)  l4t-tensorrt:r10.3.0   TENSORRT_RELEASE=10.3
ARG L4T_TENSORRT=nvcr.io/nvidia/l4t-tensorrt:r10.3.0
ARG TENSORRT_RELEASE=10.3
ARG PYTHON_VERSION=3.12

# The base's own Python is 3.10, for which its bindings were made; GranQ needs a newer one. uv brings that, and the
# bindings are compiled for it from NVIDIA's sources of the same release. Compilers stay in this stage.
FROM ${L4T_TENSORRT}-devel AS python
ARG PYTHON_VERSION
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_INSTALL_DIR=/opt/python
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential ca-certificates cmake git python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m pip install --no-cache-dir uv==0.13.9 \
    && uv python install "$PYTHON_VERSION" \
    && uv venv --python "$PYTHON_VERSION" --managed-python /opt/granq

FROM python AS bindings
ARG PYTHON_VERSION
ARG TENSORRT_RELEASE
ARG PYBIND11_VERSION=2.13.6
WORKDIR /build
RUN git clone --depth 1 --branch "release/$TENSORRT_RELEASE" https://github.com/NVIDIA/TensorRT.git TensorRT \
    && git -C TensorRT submodule update --init --depth 1 parsers/onnx \
    && git clone --depth 1 --branch "v$PYBIND11_VERSION" https://github.com/pybind/pybind11.git external/pybind11 \
    && mkdir -p "external/python$PYTHON_VERSION" \
    && ln -s "$(/opt/granq/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
        "external/python$PYTHON_VERSION/include" \
    && uv pip install --python /opt/granq setuptools wheel
WORKDIR /build/TensorRT/python
RUN PATH=/opt/granq/bin:$PATH TRT_OSSPATH=/build/TensorRT EXT_PATH=/build/external TARGET_ARCHITECTURE=aarch64 \
    TENSORRT_MODULE=tensorrt PYTHON_MAJOR_VERSION=3 PYTHON_MINOR_VERSION="${PYTHON_VERSION#3.}" bash ./build.sh \
    && mkdir /bindings && find build -name 'tensorrt-*.whl' -exec cp {} /bindings ';' \
    && test -n "$(ls /bindings)"

FROM python AS environment
WORKDIR /source
# Dependencies come before sources: this layer changes with these files alone.
COPY pyproject.toml ./
COPY constraints constraints
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --python /opt/granq --requirements pyproject.toml --extra evaluator --extra s3 --extra tracing \
    --constraint constraints/evaluator.txt
COPY --from=bindings /bindings /bindings
COPY README.md hatch_build.py ./
COPY protos protos
COPY granq granq
COPY services services
RUN --mount=type=cache,target=/root/.cache/uv \
    uv build --wheel --python /opt/granq --out-dir /wheel \
    && uv pip install --offline --python /opt/granq --no-deps /bindings/*.whl /wheel/*.whl \
    && uv pip check --python /opt/granq

FROM ${L4T_TENSORRT}-runtime AS evaluator-jetson
# A number, so that Kubernetes can see that it is not root. The group video owns a Jetson's GPU devices.
RUN useradd --uid 10001 --user-group --groups video --no-create-home --home-dir /tmp --shell /usr/sbin/nologin granq \
    && install --directory --owner=10001 --group=10001 /data
COPY --from=environment /opt/python /opt/python
COPY --from=environment /opt/granq /opt/granq
ENV PATH=/opt/granq/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    GRANQ_HOST=0.0.0.0 \
    GRANQ_LOG_FORMAT=json \
    GRANQ_PORT=50053 \
    GRANQ_DATASET_ROOT=/data/datasets \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /data
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-m", "services.common.rpc.health"]
# gRPC, metrics
EXPOSE 50053 51053
ENTRYPOINT ["python", "-m", "services.evaluator"]
