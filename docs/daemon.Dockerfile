# The daemon in an image of its own; see docker.md. Build it in a clone of the repository.
FROM python:3.12-slim
# Ranks compile transformers with it; Python's headers are in the image already.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir '/src[daemon]'
# Where compilers and libraries keep what they make, whatever account it runs as.
ENV HOME=/tmp
ENTRYPOINT ["xdit-sidecar", "serve", "--runtime-dir", "/run/xdit-sidecar"]
