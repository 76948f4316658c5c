# The trainer on CUDA, as `slurm/README.md` uses it. Not built by the project's tests, which have no Docker.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# DeepSpeed and torch.compile build extensions when they are first used: g++, nvcc (of the image) and Python's headers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends software-properties-common g++ make git ninja-build \
    && add-apt-repository -y ppa:deadsnakes/ppa \
    && apt-get install -y --no-install-recommends python3.11 python3.11-dev python3.11-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.11 -m venv /opt/univitar
ENV PATH=/opt/univitar/bin:$PATH

WORKDIR /workspace/univitar_ds
# The dependencies first, so that a change of the code does not install them again.
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps .

ENTRYPOINT ["univitar-ds"]
