# The worker without weights. They come from MODEL_DIR: see "Deploy" in README.md.

FROM python:3.12-slim-bookworm AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# The dependencies alone, so that a change of our code does not fetch them again.
RUN /opt/venv/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *project['optional-dependencies']['worker'], sep='\n')" > dependencies.txt \
    && /opt/venv/bin/pip install --constraint constraints.txt --requirement dependencies.txt \
    && /opt/venv/bin/pip uninstall --yes torchvision torchaudio xformers


FROM python:3.12-slim-bookworm AS worker
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 avatar
COPY --from=packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 \
    IMPORT_GUARD=block \
    RUNPOD_INIT_TIMEOUT=800 \
    RUNPOD_LOG_LEVEL=INFO \
    RUNPOD_MIN_DISK_PERCENT=1
WORKDIR /app
COPY LICENSE NOTICE README.md pyproject.toml handler.py ./
COPY worker worker
COPY builder builder
# Proves that the classes load and run in this very environment; "require" does not hide, it fails.
RUN IMPORT_GUARD=require python -m worker doctor --imports
USER 1000
ENTRYPOINT ["tini", "--"]
CMD ["python", "handler.py"]
