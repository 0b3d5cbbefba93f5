#!/usr/bin/env bash
# Makes the records of the studies, book/results/*.json, from the repository's root, in its environment:
#
#     book/record.sh ROOT RUNS [NAME…]
#
# ROOT holds the data sets (see `cddlib data`), RUNS is a folder for the runs; without names every record is made.
# Every command resumes where it was stopped. JOBS processes share the runs, and OMP_NUM_THREADS cores are shared by
# them. The settings are small enough for a CPU: networks of width 32, few and short student steps, few iterations.
# Learning rates and first step sizes were chosen in trials of a minute, so that the probes' losses fall. On a GPU:
# WIDTH=128 JOBS=1 book/record.sh ROOT RUNS.
set -euo pipefail

root=$1 runs=$2
shift 2
jobs=${JOBS:-3}
width=${WIDTH:-32}
results=book/results
cifar10="--method mtt --data cifar10 --root $root --buffer $runs/cifar10 --window-end 18 --jobs $jobs"
ipc1="--ipc 1 --student-steps 20 --lr-images 100 --step-size 0.012 --lr-step-size 1e-7"
ipc10="--ipc 10 --student-steps 12 --student-batch 50 --lr-images 200 --step-size 0.014 --lr-step-size 1e-6"
ipc50="--ipc 50 --student-steps 12 --student-batch 50 --lr-images 1000 --step-size 0.012 --lr-step-size 1e-6"
cifar10_probes="--probe-starts 0 4 8 12 16"
digits="--data digits --buffer $runs/digits --jobs $jobs"
digits_probes="--probe-starts 0 2 4 6 8 10"

buffers() {
    cddlib buffer --data digits --out "$runs/digits"
    cddlib buffer --data cifar10 --root "$root" --width "$width" --experts 3 --epochs 20 --no-holdout --out "$runs/cifar10"
    python -m cddbook record "$runs/cifar10" --to $results/study-buffer-cifar10.json
    cddlib buffer --data fashion_mnist --root "$root" --width "$width" --experts 2 --epochs 15 --out "$runs/fashion"
}

study() { # NAME COMMAND OPTIONS…
    local name=$1 command=$2
    shift 2
    # shellcheck disable=SC2068 # the options are words
    python -m cddbook "$command" $@ --out "$runs/$name"
    python -m cddbook record "$runs/$name" --to "$results/$name.json"
}

correlation-digits-ipc1() { study correlation-digits-ipc1 correlate "$digits --ipc 1 $digits_probes --iterations 24 --replicates 6"; }
remedies-digits-ipc1() { study remedies-digits-ipc1 compare "$digits --what remedies --ipc 1 --segments 4 $digits_probes --iterations 96 --validate-every 24 --probe-every 8 --seeds 4"; }
correlation-cifar10-ipc1() { study correlation-cifar10-ipc1 correlate "$cifar10 $ipc1 $cifar10_probes --iterations 30"; }
correlation-cifar10-ipc10() { study correlation-cifar10-ipc10 correlate "$cifar10 $ipc10 $cifar10_probes --iterations 16"; }
correlation-cifar10-ipc50() { study correlation-cifar10-ipc50 correlate "$cifar10 $ipc50 $cifar10_probes --iterations 16"; }
segments-cifar10-ipc1() { study segments-cifar10-ipc1 compare "$cifar10 $ipc1 --probe-starts 0 2 4 6 8 10 12 14 16 --iterations 320 --validate-every 40 --probe-every 8 --evaluation-epochs 300 --networks 2"; }
segments-cifar10-ipc10() { study segments-cifar10-ipc10 compare "$cifar10 $ipc10 $cifar10_probes --counts 1 4 --iterations 64 --validate-every 32 --probe-every 8 --evaluation-epochs 100 --networks 2"; }
segments-cifar10-ipc50() { study segments-cifar10-ipc50 compare "$cifar10 $ipc50 $cifar10_probes --counts 1 4 --iterations 64 --validate-every 32 --probe-every 8 --evaluation-epochs 40 --networks 2"; }

search="--data digits --buffer $runs/digits --jobs $jobs"
fashion="--data fashion_mnist --root $root --buffer $runs/fashion --student-steps 20 --window-end 12 --lr-step-size 1e-6 --evaluation-epochs 200 --jobs $jobs"

search-digits-mtt-ipc1() { study search-digits-mtt-ipc1 search "$search --method mtt --ipc 1 --vary lr_images=10,30,100 step_size=0.02,0.05,0.1"; }
search-digits-mtt-ipc10() { study search-digits-mtt-ipc10 search "$search --method mtt --ipc 10 --vary lr_images=30,100,300 step_size=0.02,0.05"; }
search-digits-tesla-ipc1() { study search-digits-tesla-ipc1 search "$search --method tesla --ipc 1 --vary lr_images=10,30,100"; }
search-digits-datm-ipc1() { study search-digits-datm-ipc1 search "$search --method datm --ipc 1 --vary lr_images=10,30,100 lr_labels=0.5,2"; }
search-digits-att-ipc1() { study search-digits-att-ipc1 search "$search --method att --ipc 1 --vary student_steps=20,40 lr_images=30,100"; }
search-digits-mct-ipc1() { study search-digits-mct-ipc1 search "$search --method mct --ipc 1 --vary expert_epochs=2,4 lr_images=10,30,100"; }
search-fashion-mtt-ipc1() { study search-fashion-mtt-ipc1 search "$fashion --method mtt --ipc 1 --iterations 60 --validate-every 30 --seeds 1 --vary lr_images=30,100,300 step_size=0.01,0.03"; }
search-fashion-mtt-ipc10() { study search-fashion-mtt-ipc10 search "$fashion --method mtt --ipc 10 --student-batch 50 --iterations 30 --validate-every 15 --seeds 1 --vary lr_images=100,300,1000 step_size=0.02"; }
searches="search-digits-mtt-ipc1 search-digits-mtt-ipc10 search-digits-tesla-ipc1 search-digits-datm-ipc1 search-digits-att-ipc1
 search-digits-mct-ipc1 search-fashion-mtt-ipc1 search-fashion-mtt-ipc10"

methods() { # each on experts of its own kind; seqmatch needs an image of every class in each of its two subsets
    local name ipc experts
    for name in mtt tesla ftd datm pad att mct seqmatch contra; do
        case $name in ftd | datm) experts=digits-flat ;; pad) experts=digits-pad ;; *) experts=digits ;; esac
        ipc=$([ $name = seqmatch ] && echo 2 || echo 1)
        cddlib buffer --method $name --data digits --ipc $ipc --out "$runs/$experts"
        cddlib distill --method $name --data digits --ipc $ipc --buffer "$runs/$experts" --out "$runs/method-digits-$name"
        cddlib evaluate "$runs/method-digits-$name" --runs 5
        python -m cddbook record "$runs/method-digits-$name" --to "$results/method-digits-$name.json"
    done
}

all="buffers correlation-digits-ipc1 remedies-digits-ipc1 correlation-cifar10-ipc1
 segments-cifar10-ipc1 correlation-cifar10-ipc10 correlation-cifar10-ipc50 segments-cifar10-ipc10 segments-cifar10-ipc50 $searches methods"
for name in ${@:-$all}; do
    echo "== $name"
    "$name"
done
