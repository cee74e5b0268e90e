# The worker: alone (the last stage, which is what `docker build` makes), or with the weights of one
# variant inside (--target worker-bf16 or worker-fp8). See docs/image.md.

# The tag and no digest: none could be read where this file was written. docs/image.md says how to pin one.
FROM python:3.12-slim-bookworm AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
WORKDIR /build
# The dependencies alone, so that a change of our code does not fetch them again. They are one layer, of
# which registries take 10 GB; and the image of the code alone is to stay below that. Each file has the
# hash that it had when `make lock` wrote the list, which is complete: pip check says so.
COPY builder/requirements.txt ./
RUN /opt/venv/bin/pip install --no-deps --require-hashes --requirement requirements.txt \
    && /opt/venv/bin/pip uninstall --yes torchvision torchaudio xformers \
    && /opt/venv/bin/pip check \
    && test -z "$(du --summarize --threshold=9GB /opt/venv)"
# What the hosts must offer, as .runpod/hub.json asks of them.
ARG CUDA_VERSION=13.0
RUN /opt/venv/bin/python -c "import os, torch; assert str(torch.version.cuda) == os.environ['CUDA_VERSION'], torch.version.cuda; print(torch.__version__, 'cuDNN', torch.backends.cudnn.version())"


# What the image consists of, as CycloneDX writes it: by a tool of which nothing stays.
FROM packages AS sbom
COPY builder/sbom-requirements.txt ./
RUN python -m venv /opt/tools \
    && /opt/tools/bin/pip install --no-deps --require-hashes --requirement sbom-requirements.txt \
    && mkdir sbom \
    && /opt/tools/bin/cyclonedx-py environment --output-file sbom/python-packages.cdx.json /opt/venv


FROM python:3.12-slim-bookworm AS base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 avatar \
    && install --directory --owner=avatar --group=avatar /models /opt/kernels
COPY --from=packages /opt/venv /opt/venv
COPY --from=sbom /build/sbom /usr/share/sbom
# Without the two of NVIDIA some container runtimes pass no GPU in; an image of nvidia/cuda sets them.
ENV PATH=/opt/venv/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=/opt/kernels \
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
    HF_HUB_OFFLINE=1 \
    IMPORT_GUARD=block \
    RUNPOD_INIT_TIMEOUT=800 \
    RUNPOD_LOG_CAPTURE=off \
    RUNPOD_LOG_LEVEL=INFO \
    RUNPOD_MIN_DISK_PERCENT=1
WORKDIR /app
USER 1000
ENTRYPOINT ["tini", "--"]
CMD ["python", "handler.py"]


# The attention's kernels, compiled without a GPU: no start is to wait for a compiler, or to import one.
FROM base AS kernels
USER 0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils \
    && rm -rf /var/lib/apt/lists/*
USER 1000
COPY worker/__init__.py worker/import_guard.py worker/
COPY worker/model worker/model
COPY builder/__init__.py builder/kernels.py builder/
RUN python -m builder.kernels


FROM base AS worker
COPY LICENSE NOTICE README.md pyproject.toml handler.py ./
COPY avatar_client avatar_client
COPY worker worker
COPY builder builder
COPY --chown=1000:1000 --from=kernels /opt/kernels /opt/kernels
# Proves that the classes load and run in this very environment; "require" does not hide, it fails.
RUN IMPORT_GUARD=require python -m worker doctor --imports


# What the builder needs and no more, so that few changes of our code make the weights again.
FROM packages AS bake
COPY builder builder
COPY worker/__init__.py worker/atomic_file.py worker/import_guard.py worker/
COPY worker/loading/__init__.py worker/loading/manifest.py worker/loading/preview.py worker/loading/
COPY worker/model worker/model


FROM bake AS weights-bf16
ARG HF_ENDPOINT=https://huggingface.co
ARG WEIGHTS_REVISION=
RUN --mount=type=secret,id=hf_token \
    /opt/venv/bin/python -m builder.bake --variant bf16 --revision "${WEIGHTS_REVISION}" --target /model --token-file /run/secrets/hf_token \
    && /opt/venv/bin/python -m builder.layers /model /layers --count 6


FROM bake AS weights-fp8
ARG HF_ENDPOINT=https://huggingface.co
ARG WEIGHTS_REVISION=
RUN --mount=type=secret,id=hf_token \
    /opt/venv/bin/python -m builder.bake --variant fp8 --revision "${WEIGHTS_REVISION}" --target /model --token-file /run/secrets/hf_token \
    && /opt/venv/bin/python -m builder.layers /model /layers --count 4


# The weights below the code, whose changes then send only themselves. They belong to the user that
# reads them: the kernel tells nobody else what the page cache holds.
FROM base AS worker-bf16
COPY --chown=1000:1000 --from=weights-bf16 /layers/1 /models/hunyuan-video-avatar/
COPY --chown=1000:1000 --from=weights-bf16 /layers/2 /models/hunyuan-video-avatar/
COPY --chown=1000:1000 --from=weights-bf16 /layers/3 /models/hunyuan-video-avatar/
COPY --chown=1000:1000 --from=weights-bf16 /layers/4 /models/hunyuan-video-avatar/
COPY --chown=1000:1000 --from=weights-bf16 /layers/5 /models/hunyuan-video-avatar/
COPY --chown=1000:1000 --from=weights-bf16 /layers/6 /models/hunyuan-video-avatar/
COPY --from=worker /app ./
COPY --chown=1000:1000 --from=kernels /opt/kernels /opt/kernels
RUN python -m builder.verify /models/hunyuan-video-avatar


FROM base AS worker-fp8
COPY --chown=1000:1000 --from=weights-fp8 /layers/1 /models/hunyuan-video-avatar/
COPY --chown=1000:1000 --from=weights-fp8 /layers/2 /models/hunyuan-video-avatar/
COPY --chown=1000:1000 --from=weights-fp8 /layers/3 /models/hunyuan-video-avatar/
COPY --chown=1000:1000 --from=weights-fp8 /layers/4 /models/hunyuan-video-avatar/
COPY --from=worker /app ./
COPY --chown=1000:1000 --from=kernels /opt/kernels /opt/kernels
RUN python -m builder.verify /models/hunyuan-video-avatar


FROM worker
