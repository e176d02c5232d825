# segdiff for a machine without a GPU. From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t segdiff:cpu .
#   docker run --rm --shm-size=2g -p 127.0.0.1:8700:8700 -e SEGDIFF_TOKEN=... segdiff:cpu serve --host 0.0.0.0
#   docker run --rm --shm-size=2g -v "$PWD/runs:/work/runs" segdiff:cpu demo
FROM python:3.11-slim
# DeepSpeed compiles its collective for CPUs at first use. KubeRay's probes of a pod call wget.
RUN apt-get update && apt-get install -y --no-install-recommends g++ wget && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/segdiff
COPY . .
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch \
 && pip install --no-cache-dir -c constraints.txt '.[serve]'
RUN useradd --create-home segdiff && mkdir /work && chown segdiff /work
USER segdiff
WORKDIR /work
ENTRYPOINT ["segdiff"]
CMD ["--help"]
