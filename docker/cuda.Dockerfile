# segdiff for NVIDIA GPUs. The host needs a driver for CUDA 13 and the NVIDIA container toolkit. From the root:
#   docker build -f docker/cuda.Dockerfile -t segdiff:cuda .
#   docker run --rm --gpus all --shm-size=16g -p 127.0.0.1:8700:8700 -e SEGDIFF_TOKEN=... segdiff:cuda serve --host 0.0.0.0
#   docker run --rm --gpus all --shm-size=16g -v "$PWD/runs:/work/runs" segdiff:cuda doctor
# The CUDA libraries come with torch's own packages; the compiler is for Triton and DeepSpeed,
# wget for KubeRay's probes of a pod.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ wget && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/segdiff
COPY . .
RUN pip install --no-cache-dir -c constraints.txt torch \
 && pip install --no-cache-dir -c constraints.txt '.[cuda,serve]'
RUN useradd --create-home segdiff && mkdir /work && chown segdiff /work
USER segdiff
WORKDIR /work
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["segdiff"]
CMD ["--help"]
