#!/usr/bin/env bash
# Makes the records of the studies, book/results/*.json, from the repository's root, in its environment:
#
#     book/record.sh ROOT RUNS [NAME…]
#
# ROOT holds the data sets (see `cddlib data`), RUNS is a folder for the runs; without names every record is made.
# Every command resumes where it was stopped: MINUTES=90 book/record.sh ROOT RUNS works for so long and says what is
# left. JOBS processes share the runs (0: one after the other in one process), and OMP_NUM_THREADS cores are shared by
# them. OPTIONS come last in every study's command, and overrule it. The cells come in the order of what they decide for
# what they cost: first the comparison of K at width 32 and its rates (four hours of one core), then correlation (two
# hours), then the published network (hours), then the digits.
set -euo pipefail

root=$1 runs=$2
shift 2
jobs=${JOBS:-3}
width=${WIDTH:-32}
results=book/results
end=$((SECONDS + 60 * ${MINUTES:-1000000}))

within() { # COMMAND OPTIONS…: stopped, like by Ctrl-C, when the time is over
    local left=$((end - SECONDS))
    [ $left -gt 0 ] && timeout --foreground --signal INT $left "$@"
}

cddlib() { within python -m cddlib "$@"; }
cddbook() { within python -m cddbook "$@"; }

mtt="--method mtt --data cifar10 --root $root --jobs $jobs"
short="$mtt --buffer $runs/cifar10-short --student-steps 20 --window-end 4 --lr-step-size 1e-6 --compiled True"
one_rate="--lr-images 300 --step-size 0.02"
published="$mtt --ipc 1 --buffer $runs/cifar10-published --precision bfloat16"
digits="--data digits --buffer $runs/digits --jobs $jobs"
digits_probes="--probe-starts 0 2 4 6 8 10"

study() { # NAME COMMAND OPTIONS…
    local name=$1 command=$2
    shift 2
    # shellcheck disable=SC2068 # the options are words
    cddbook "$command" $@ ${OPTIONS:-} --out "$runs/$name"
    cddbook record "$runs/$name" --to "$results/$name.json"
}

buffers-short() {
    cddlib buffer --method mtt --data cifar10 --root "$root" --width "$width" --experts 8 --epochs 6 --out "$runs/cifar10-short"
    cddbook record "$runs/cifar10-short" --to $results/study-buffer-cifar10-short.json
}
rates() { # NAME K EXPERTS STEP_SIZES: 320 matched segments, compared on validation images
    local iterations=$((320 / $2))
    study "$1" search "$3 --ipc 1 --segments $2 --iterations $iterations --validate-every $iterations --validation-runs 3 --vary lr_images=100,300,1000 step_size=$4 --seeds 2"
}
rates-cifar10-ipc1-k1() { rates rates-cifar10-ipc1-k1 1 "$short" 0.01,0.02,0.06; }
rates-cifar10-ipc1-k2() { rates rates-cifar10-ipc1-k2 2 "$short" 0.01,0.02,0.06; }
rates-cifar10-ipc1-k4() { rates rates-cifar10-ipc1-k4 4 "$short" 0.01,0.02,0.06; }
segments() { # IPC: 2,000 matched segments
    study "segments-cifar10-ipc$1" compare "$short $one_rate --ipc $1 --what segments --counts 1 2 4 --iterations 2000 --validate-every 500 --validation-runs 2 --probe-starts 0 1 2 3 --probe-every 50 --seeds 5 --networks 10"
}
segments-cifar10-ipc1() { segments 1; }
segments-cifar10-ipc1-long() { # 3,000 iterations with K = 4, and as much compute with K = 1; the error is measured on the way
    study segments-cifar10-ipc1-long compare "$short $one_rate --ipc 1 --what segments --counts 1 4 --iterations 12000 --validate-every 1000 --validation-runs 2 --probe-starts 0 1 2 3 --probe-every 200 --error-every 1000 --seeds 4 --networks 10 --no-baselines"
}
buffers-window18() { # the same experts, trained until the last of 18 start epochs has a segment of two
    cddlib buffer --method mtt --data cifar10 --root "$root" --width "$width" --experts 8 --epochs 20 --compiled True --out "$runs/cifar10-window18"
    cddbook record "$runs/cifar10-window18" --to $results/study-buffer-cifar10-window18.json
}
window18="${short/cifar10-short/cifar10-window18} --window-end 18"
rates-cifar10-ipc1-window18-k1() { rates rates-cifar10-ipc1-window18-k1 1 "$window18" 0.01,0.02,0.06; }
rates-cifar10-ipc1-window18-k4() { rates rates-cifar10-ipc1-window18-k4 4 "$window18" 0.01,0.02,0.06; }
rates-cifar10-ipc1-window18-k2() { rates rates-cifar10-ipc1-window18-k2 2 "$window18" 0.01,0.02,0.06; }
sets() { # STUDY BUFFER K…: where a comparison on CIFAR-10 began, and what its first seed made of it, as pictures and in full
    local study=$1 buffer=$2 out=$results/sets/$1 k
    shift 2
    rm -rf "$out"
    cddlib distill --method mtt --data cifar10 --root "$root" --ipc 1 --buffer "$runs/$buffer" --student-steps 1 --iterations 1 --validate-every 0 --lr-images 1e-9 --out "$runs/sets/$study"
    cddlib export "$runs/sets/$study" --to "$out/start.parquet" --form parquet
    for k in "$@"; do
        cddlib export "$runs/$study/K=$k/seed-0" --to "$out/k$k.parquet" --form parquet
        cddlib export "$runs/$study/K=$k/seed-0" --to "$out/k$k" --form pt
    done
}
sets-cifar10-ipc1() { sets segments-cifar10-ipc1 cifar10-short 1 2 4; }
sets-cifar10-ipc1-published() { sets segments-cifar10-ipc1-published cifar10-published 1 2; }
correlation() { # IPC: the same settings for all
    study "correlation-cifar10-ipc$1" correlate "$short $one_rate --ipc $1 --student-batch 10 --probe-starts 0 1 2 3 --iterations 100 --replicates 6"
}
correlation-cifar10-ipc1() { correlation 1; }
correlation-cifar10-ipc10() { correlation 10; }
correlation-cifar10-ipc50() { correlation 50; }

buffers-published() {
    cddlib buffer --method mtt --data cifar10 --root "$root" --experts 20 --epochs 3 --no-holdout --precision bfloat16 --out "$runs/cifar10-published"
    cddbook record "$runs/cifar10-published" --to $results/study-buffer-cifar10-published.json
}
published_counts="$published --what segments --counts 1 2 --validate-every 500 --probe-starts 0 1 --probe-every 50 --networks 10"
segments-cifar10-ipc1-published() {
    local run name=segments-cifar10-ipc1-published
    study $name compare "$published_counts --iterations 1500 --seeds 3"
    for run in "$runs/$name"/K=*/seed-*; do
        for network in alexnet vgg11; do
            cddlib evaluate "$run" --root "$root" --network $network --runs 3 --no-baselines --seed $((10 * ${run##*-}))
        done
    done
    cddbook record "$runs/$name" --to "$results/$name.json"
}
segments-cifar10-ipc1-published-long() { # the first seed goes on to as many segments as were published
    local k short=$runs/segments-cifar10-ipc1-published long=$runs/segments-cifar10-ipc1-published-long
    for k in 1 2; do
        [ -e "$long/K=$k" ] || [ ! -e "$short/K=$k/seed-0/result.json" ] || {
            mkdir -p "$long/K=$k.part" && cp -R "$short/K=$k/seed-0" "$long/K=$k.part" && mv "$long/K=$k.part" "$long/K=$k"
        }
    done
    study segments-cifar10-ipc1-published-long compare "$published_counts --iterations 5000 --error-every 1500 --seeds 1 --no-baselines"
}

buffers-window4() { # five epochs, so that the last of four start epochs has a segment of two
    cddlib buffer --method mtt --data cifar10 --root "$root" --experts 20 --epochs 5 --no-holdout --precision bfloat16 --out "$runs/cifar10-window4"
    cddbook record "$runs/cifar10-window4" --to $results/study-buffer-cifar10-window4.json
}
segments-cifar10-ipc1-window4() { # the published network and student, with as many start epochs as segments
    study segments-cifar10-ipc1-window4 compare "$mtt --ipc 1 --buffer $runs/cifar10-window4 --precision bfloat16 --window-end 4 --what segments --counts 1 2 4 --iterations 1500 --validate-every 500 --probe-starts 0 1 2 3 --probe-every 50 --seeds 2 --networks 10 --no-baselines"
}

buffers-flat() { # DATM's experts
    cddlib buffer --method datm --data cifar10 --root "$root" --experts 20 --epochs 5 --no-holdout --precision bfloat16 --out "$runs/cifar10-flat"
    cddbook record "$runs/cifar10-flat" --to $results/study-buffer-cifar10-flat.json
}
segments-cifar10-ipc1-datm() { # learned labels, 80 steps on batches of 10
    study segments-cifar10-ipc1-datm compare "--method datm --data cifar10 --root $root --jobs $jobs --ipc 1 --buffer $runs/cifar10-flat --precision bfloat16 --what segments --counts 1 4 --iterations 1000 --validate-every 250 --probe-starts 0 1 2 3 --probe-every 50 --seeds 2 --networks 10 --no-baselines"
}
segments-cifar10-ipc1-n50() { # narrow, with the published number of student steps
    study segments-cifar10-ipc1-n50 compare "$short --student-steps 50 --lr-images 300 --step-size 0.01 --ipc 1 --what segments --counts 1 2 4 --iterations 2000 --validate-every 500 --validation-runs 2 --probe-starts 0 1 2 3 --probe-every 50 --seeds 5 --networks 10 --no-baselines"
}
narrow() { # NAME DATA EPOCHS WINDOW_END COUNTS SEGMENTS SEEDS: a comparison on another data set, and its experts
    cddlib buffer --method mtt --data "$2" --root "$root" --width "$width" --experts 8 --epochs "$3" --compiled True --out "$runs/$2-narrow"
    study "$1" compare "--method mtt --data $2 --root $root --jobs $jobs --ipc 1 --buffer $runs/$2-narrow --student-steps 20 --window-end $4 --lr-step-size 1e-6 --compiled True --what segments --counts $5 --iterations $6 --validate-every 500 --validation-runs 2 --probe-starts 0 $(($4 / 2)) $(($4 - 1)) --probe-every 50 --seeds $7 --networks 10"
}
segments-fashion-ipc1() { narrow segments-fashion-ipc1 fashion_mnist 13 12 "1 2 4" 2000 8; }
segments-cifar100-ipc1() { narrow segments-cifar100-ipc1 cifar100 22 20 "1 4" 1000 6; }
wide() { # NAME DATA IPC: a published cell, with experts as long as its window needs
    cddlib buffer --method mtt --data "$2" --root "$root" --experts 20 --epochs 22 --no-holdout --precision bfloat16 --out "$runs/$2-wide"
    study "$1" compare "--method mtt --data $2 --root $root --jobs $jobs --ipc $3 --buffer $runs/$2-wide --precision bfloat16 --what segments --counts 1 4 --iterations 1000 --validate-every 250 --probe-starts 0 10 19 --probe-every 50 --seeds 1 --networks 10"
}
segments-cifar10-ipc10-published() { wide segments-cifar10-ipc10-published cifar10 10; }
segments-cifar100-ipc1-published() { wide segments-cifar100-ipc1-published cifar100 1; }

buffers-digits() { cddlib buffer --data digits --out "$runs/digits"; }
buffers-fashion() { cddlib buffer --data fashion_mnist --root "$root" --width "$width" --experts 2 --epochs 15 --out "$runs/fashion"; }
remedy() { # NAME K OPTIONS: what a remedy's comparison needs to know beforehand, from validation images
    local iterations=$((200 / $2))
    study "$1" search "$digits --ipc 1 --segments $2 --iterations $iterations --validate-every $iterations --validation-runs 3 --seeds 4 --vary $3"
}
rates-digits-k1() { remedy rates-digits-k1 1 lr_images=10,30,100,300; }
rates-digits-k4() { remedy rates-digits-k4 4 lr_images=10,30,100,300; }
rates-digits-ewc() { remedy rates-digits-ewc 1 "consolidation=ewc consolidation_strength=0.01,0.1,1,10,100"; }
rates-digits-si() { remedy rates-digits-si 1 "consolidation=si consolidation_strength=0.01,0.1,1,10,100"; }
correlation-digits-ipc1() { study correlation-digits-ipc1 correlate "$digits --ipc 1 $digits_probes --iterations 24 --replicates 6"; }
remedies-digits-ipc1() { # at the rate and the strengths that are best on validation images
    study remedies-digits-ipc1 compare "$digits --what remedies --ipc 1 --segments 4 $digits_probes --iterations 200 --validate-every 40 --validation-runs 3 --probe-every 4 --seeds 8 --networks 10 --change ewc.consolidation_strength=0.01 si.consolidation_strength=0.01"
}

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
        cddbook record "$runs/method-digits-$name" --to "$results/method-digits-$name.json"
    done
}

all="buffers-short rates-cifar10-ipc1-k1 rates-cifar10-ipc1-k4 rates-cifar10-ipc1-k2 segments-cifar10-ipc1 sets-cifar10-ipc1
 segments-cifar10-ipc1-long buffers-window18 rates-cifar10-ipc1-window18-k1 rates-cifar10-ipc1-window18-k4 rates-cifar10-ipc1-window18-k2
 correlation-cifar10-ipc1 correlation-cifar10-ipc10 correlation-cifar10-ipc50 buffers-published segments-cifar10-ipc1-published
 segments-cifar10-ipc1-published-long sets-cifar10-ipc1-published buffers-window4 segments-cifar10-ipc1-window4
 segments-cifar10-ipc1-n50 buffers-flat segments-cifar10-ipc1-datm segments-fashion-ipc1 segments-cifar100-ipc1
 segments-cifar10-ipc10-published segments-cifar100-ipc1-published
 buffers-digits correlation-digits-ipc1 rates-digits-k1 rates-digits-k4 rates-digits-ewc rates-digits-si remedies-digits-ipc1 buffers-fashion $searches methods"
left=""
for name in ${@:-$all}; do
    if [ $SECONDS -lt $end ]; then
        echo "== $name"
        "$name" || { [ $SECONDS -ge $end ] || exit 1; }
    fi
    [ $SECONDS -lt $end ] || left="$left $name"
done
[ -z "$left" ] || echo "The time is over; left:$left"
