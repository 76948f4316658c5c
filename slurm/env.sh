# Settings of every job before it starts Python. Some clusters need the lines that are commented out.

# module load cuda            # the driver is enough: torch brings its own CUDA libraries

# Threads of one rank. A checkpoint stores this number: with another number results are equal up to rounding only.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# The log shows lines immediately, and the stack of a process that a fatal signal ends.
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# Python does not import a random.py or tokenizers/ in the folder of the job. The project must be installed in PYTHON's
# environment, as `make` does it.
export PYTHONSAFEPATH=1

# The size of packs changes from step to step; expandable segments avoid fragmentation of GPU memory.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# A cache per node: hundreds of ranks that write one cache in a shared home would wait for each other.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}

# NCCL logs its errors; INFO also logs which network it uses.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# The network that connects nodes with several networks, for NCCL's bootstrap and for CPU ranks (gloo). Needed if the
# launch hangs or gloo connects to 127.0.0.1; `ip -brief address` shows the names.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Excludes an InfiniBand card that is used for storage and not for training.
# export NCCL_IB_HCA=^mlx5_2
