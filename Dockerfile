# Two images: `gpu`, the default, on NVIDIA's PyTorch image, and `cpu` on a plain Python. docs/DEPLOY.md shows both.
#
#   docker build -t geoscale .
#   docker build -t geoscale:cpu --target cpu .
#
# The base must have Python 3.10 or newer with venv, and useradd.
ARG GPU_BASE=nvcr.io/nvidia/pytorch:26.06-py3
ARG CPU_BASE=python:3.12-slim-bookworm

FROM ${CPU_BASE} AS cpu
# Where pip looks, for instance for torch without CUDA. They show in `docker history`: no passwords here.
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-geoscale (CPU)" \
      org.opencontainers.image.description="FP8 attention scales predicted from the weights, for Megatron-Core" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/venv/bin:${PATH} OMP_NUM_THREADS=1
RUN python3 -m venv /opt/venv \
 && useradd --create-home --uid 10001 geoscale
WORKDIR /workspace/geoscale
# The dependencies are a layer of their own: a change of the code does not install torch again.
COPY --chown=10001:10001 LICENSE README.md constraints.txt pyproject.toml ./
COPY --chown=10001:10001 megatron_geoscale/__init__.py megatron_geoscale/
RUN pip install --no-cache-dir -c constraints.txt -e '.[hf,plot]'
COPY --chown=10001:10001 . .
RUN python -m megatron_geoscale.doctor && chown 10001:10001 .
USER 10001
CMD ["python", "-m", "megatron_geoscale.doctor"]

FROM ${GPU_BASE} AS gpu
ARG MEGATRON_CORE_VERSION=0.16.1
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-geoscale" \
      org.opencontainers.image.description="FP8 attention scales predicted from the weights, for Megatron-Core" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --create-home --uid 10001 geoscale
WORKDIR /workspace/geoscale
COPY --chown=10001:10001 LICENSE README.md constraints.txt pyproject.toml ./
COPY --chown=10001:10001 megatron_geoscale/__init__.py megatron_geoscale/
# The base's torch, Transformer Engine and Apex were built for each other. Its PIP_CONSTRAINT holds for what is
# installed; it is off only where the project itself is built, in an environment that pip throws away. Whatever the
# base brought must be there unchanged in the end.
# hadolint ignore=DL3013
RUN pip list --format=freeze >/tmp/before \
 && pip install --no-cache-dir --no-deps "megatron-core==${MEGATRON_CORE_VERSION}" \
 && pip install --no-cache-dir \
        numpy psutil rich safetensors sentencepiece tensorboard tqdm transformers zstandard \
 && PIP_CONSTRAINT='' pip install --no-cache-dir --no-deps -e . \
 && pip list --format=freeze >/tmp/after \
 && sort -o /tmp/before /tmp/before && sort -o /tmp/after /tmp/after \
 && comm -23 /tmp/before /tmp/after >/tmp/changed \
 && if test -s /tmp/changed; then echo "the install has changed packages of the base:"; cat /tmp/changed; exit 1; fi \
 && rm /tmp/before /tmp/after /tmp/changed
COPY --chown=10001:10001 . .
# Where images are built there is no GPU as a rule; on a machine that has one, DOCTOR_FLAG=--gpu demands that it works.
ARG DOCTOR_FLAG
RUN python -m megatron_geoscale.doctor ${DOCTOR_FLAG:+"$DOCTOR_FLAG"} && chown 10001:10001 .
USER 10001
CMD ["python", "-m", "megatron_geoscale.doctor"]
