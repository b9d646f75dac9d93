# A plain Python image, not one of NVIDIA's: torch's wheels bring their own CUDA libraries, and a CUDA base
# image would hold a second copy of them. The host needs the driver and the NVIDIA container toolkit only.
FROM python:3.12-slim

# Triton compiles its launchers with a C compiler when a kernel first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# What the container toolkit needs to be told where the base image is not NVIDIA's.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HOME=/cache/huggingface \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

RUN useradd --create-home --uid 1000 vlm \
    && install -d -o vlm -g vlm /cache/huggingface

WORKDIR /build

# The dependencies are gigabytes and seldom change: they have a layer of their own, before the code.
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['otel'], sep='\n')" \
        > requirements.txt \
    && pip install --requirement requirements.txt

COPY server/ server/
COPY engine/ engine/
COPY bench/ bench/
COPY demo/ demo/
COPY templates/ templates/
RUN pip install --no-deps .

WORKDIR /home/vlm
USER 1000:1000
VOLUME /cache/huggingface
EXPOSE 8000

# A first start downloads the model. Failures count only once it could have been loaded.
# The check fits the default port without TLS: give `docker run --health-cmd` with other settings.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# Listens on every address of the container; which of them the host can reach is for `docker run --publish` to say.
ENTRYPOINT ["python", "-m", "server", "--host", "0.0.0.0"]
