# docker build -t deepseek_train .          the image for GPU nodes; needs no GPU to build
# The base brings torch, CUDA, NCCL and Python. Any image with Python 3.11+ and pip will do: what has no torch gets it.
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${BASE}

# Optional dependencies of pyproject.toml.
ARG EXTRAS=wandb,nvml,zstd
# A tag or commit of NVIDIA's apex to build from source (minutes, needs nvcc); empty: none. PyPI's "apex" is another
# project, never install it.
ARG APEX_REF=

ENV PYTHONUNBUFFERED=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3013,DL3042
RUN if [ -n "${APEX_REF}" ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 python3 -m pip install --no-build-isolation \
            "apex @ git+https://github.com/NVIDIA/apex.git@${APEX_REF}" \
        && python3 -c "import torch; from fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp32"; \
    fi

WORKDIR /workspace/deepseek_train
COPY pyproject.toml README.md LICENSE ./
COPY deepseek_train ./deepseek_train
COPY configs ./configs
# Not editable, and the base's own torch stays: its version is the constraint.
# hadolint ignore=DL3013
RUN { python3 -m pip list --format=freeze | grep '^torch==' || true; } > /tmp/keep.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/keep.txt ".[${EXTRAS}]" \
    && rm /tmp/keep.txt \
    && python3 -c "import deepseek_train, torch; print('torch', torch.__version__)"
COPY launch ./launch

ENTRYPOINT ["deepseek-train"]
