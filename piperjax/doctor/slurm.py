"""This file is the checks of a SLURM job: do its numbers agree, and do processes and GPUs fit together."""

from piperjax.doctor.devices import VISIBLE
from piperjax.doctor.environment import Environment
from piperjax.doctor.finding import Finding, error, note, ok, warning
from piperjax.doctor.host import gpus

# What jax.distributed reads of a step.
NEEDED = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def in_a_job(env: Environment) -> bool:
    """Whether SLURM started this."""
    return "SLURM_JOB_ID" in env.environ


def step(env: Environment) -> list[Finding]:
    """Whether processes will find each other in the variables of a step."""
    if not in_a_job(env):
        return []
    tasks = env.number("SLURM_STEP_NUM_TASKS") or 1
    if tasks == 1:
        wanted = env.number("SLURM_NTASKS") or 1
        if wanted > 1:
            found = f"the job has {wanted} tasks, but this is one process outside srun"
            return [
                note("slurm", found, "start train.py with srun, as launch/*.sbatch do; check with srun too")
            ]
        return [ok("slurm", f"job {env.environ['SLURM_JOB_ID']}, one process")]
    missing = [name for name in NEEDED if name not in env.environ]
    if missing:
        found = f"a step of {tasks} tasks without {', '.join(missing)}"
        return [error("slurm", found, "pass SLURM's variables on, in a container too, or give --coordinator")]
    numbers = {name: env.number(name) for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")}
    odd = [name for name, value in numbers.items() if value is None]
    if odd:
        return [
            error("slurm", f"{odd[0]}={env.environ[odd[0]]} is not a number", "do not set SLURM's variables")
        ]
    if numbers["SLURM_NTASKS"] != tasks or numbers["SLURM_PROCID"] >= tasks:
        found = (
            f"SLURM_NTASKS={numbers['SLURM_NTASKS']} and SLURM_PROCID={numbers['SLURM_PROCID']} do not fit a step of "
            f"{tasks} tasks"
        )
        return [
            error("slurm", found, "unset SLURM_NTASKS before srun, or give srun the same --ntasks as the job")
        ]
    return [ok("slurm", f"process {numbers['SLURM_PROCID']} of {tasks} on {env.num_nodes} nodes")]


def distribution(env: Environment) -> list[Finding]:
    """Whether consecutive processes fill a node before the next, since experts are laid out so."""
    layout = env.environ.get("SLURM_DISTRIBUTION", "block").split(":")[0].split(",")[0]
    if in_a_job(env) and env.num_nodes > 1 and layout not in ("block", "*", "pack", "nopack"):
        advice = "give srun --distribution=block:block: the expert axis is on consecutive processes"
        return [warning("slurm", f"SLURM_DISTRIBUTION={layout} deals processes out to nodes in turn", advice)]
    return []


def gpu_binding(env: Environment) -> list[Finding]:
    """Whether each process sees the GPU that JAX will take: number SLURM_LOCALID of those it sees (jax issue 23452)."""
    local = env.number("SLURM_LOCALID")
    if env.backend == "cpu" or local is None or (env.number("SLURM_STEP_NUM_TASKS") or 1) == 1:
        return []
    seen = [env.environ[name] for name in VISIBLE if env.environ.get(name)]
    visible = min((len(value.split(",")) for value in seen), default=len(gpus(env)))
    if visible and local >= visible:
        sees = f"{visible} GPU{'s' if visible > 1 else ''}"
        found = f"process {local} of this node sees {sees}, but JAX gives it GPU {local}"
        advice = "let every process see all of a node's GPUs: srun --gpu-bind=none, and --gpus-per-node, not per task"
        return [error("slurm", found, advice)]
    per_node = -(-(env.number("SLURM_STEP_NUM_TASKS") or 1) // env.num_nodes)
    if visible > per_node:
        found = f"{per_node} processes per node leave {visible - per_node} of {visible} GPUs idle"
        return [warning("slurm", found, f"start one process per GPU: --ntasks-per-node={visible}")]
    return []


CHECKS = (step, distribution, gpu_binding)
