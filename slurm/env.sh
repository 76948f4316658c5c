# Settings of every job before it starts Python. Lines that are commented out are for clusters that need them.

# module load cuda            # the driver is enough: torch brings its own CUDA libraries

# Threads of one rank. A checkpoint stores the number: with another one results agree to rounding, not bit for bit.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# The log shows lines immediately, and the stack of a process that a fatal signal ends.
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

# A random.py or tokenizers/ in the folder of the job is not imported. The project must be installed in PYTHON's
# environment, as `make` does it.
export PYTHONSAFEPATH=1

# Packs have another size in every step; expandable segments avoid fragmentation of GPU memory.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# Hundreds of ranks that write one cache in a shared home wait for each other.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}

# NCCL logs its errors; INFO also logs which network it uses.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Nodes with several networks: the one that connects the nodes, for NCCL's bootstrap and for CPU ranks (gloo). Needed when
# the start hangs or gloo connects to 127.0.0.1; `ip -brief address` shows the names.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# InfiniBand cards that carry storage and not training are left out like this.
# export NCCL_IB_HCA=^mlx5_2
