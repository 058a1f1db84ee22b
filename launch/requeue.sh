# Sourced by the job scripts: runs a job step, and puts the job back into the queue when time ran out before it was done.
#
#   run_and_requeue COMMAND...
#
# SLURM sends SIGUSR1 to the script some minutes before the time limit (#SBATCH --signal=B:USR1@300). It is passed on;
# srun hands it to every process, they save after the step in progress and exit. The job is then requeued under its
# own number, and the same command line resumes from that checkpoint. A job that finishes or fails by itself is not.

run_and_requeue() {
    local asked=no step code=0
    "$@" &
    step=$!
    trap 'asked=yes; kill -USR1 "$step" 2>/dev/null' USR1
    wait "$step" || code=$?
    # `wait` returns early when a signal arrives; the step is then still saving.
    while kill -0 "$step" 2>/dev/null; do
        code=0
        wait "$step" || code=$?
    done
    trap - USR1
    if [ "$asked" = yes ] && [ "$code" -ne 0 ]; then
        echo "time is up: requeueing job $SLURM_JOB_ID, it goes on from its last checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
        return 0
    fi
    return "$code"
}

# Leaves with one sentence unless this is the repository and `make install` was run in it.
check_installed() {
    if [ ! -f train.py ]; then
        echo "submit the job from the root of the repository; there is no train.py in $PWD" >&2
        exit 2
    fi
    if [ ! -x .venv/bin/python ]; then
        echo "there is no .venv in $PWD; run 'make install EXTRA=$1' on a login node first" >&2
        exit 2
    fi
}
