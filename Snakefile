"""The book's rules: the data, then trainings and chapters in parallel, then the pages.

`dernet run` uses this file. On a cluster, call Snakemake itself with one of its executor plug-ins,
first for the data, then for the book:

    snakemake prepare --config profile=paper --rerun-triggers params --executor slurm --jobs 8
    snakemake book --config profile=paper --rerun-triggers params --executor slurm --jobs 8

Each rule's digest is one of its parameters: with --rerun-triggers params, a rule runs again when the
contents on which it depends have changed; file times do not count. A job's output is shown and kept
in its log, whose end `dernet run` repeats if the job fails.
"""

import os
import shlex
import sys
from functools import partial

from dernet_utils.book import graph
from dernet_utils.core.environment import absolute_folders
from dernet_utils.core.workspace import open_workspace

os.environ.update(absolute_folders())  # jobs are started in another folder
workspace = open_workspace(config.get("profile", ""))
profile = workspace.profile.name
dernet = f"{shlex.quote(sys.executable)} -m dernet_utils.cli"
priorities = graph.priorities(graph.chapter_names())
chapters = list(priorities)
compute = " ".join(f"{name}={value}" for name, value in graph.TRAINING_ENVIRONMENT.items())
# Never more threads than there are cores: Snakemake would later free more cores than it has and start
# too many jobs.
every_core = min(workflow.cores or graph.MAX_THREADS, graph.MAX_THREADS)


def train_digest(network, wildcards):
    return graph.train_digest(network, workspace)


workdir: str(workspace.folder)


rule book:
    input:
        expand("chapters/{chapter}.ipynb", chapter=chapters),
    output:
        "book/_build/html/index.html",
    log:
        "logs/book.log",
    params:
        digest=graph.book_digest(workspace),
    shell:
        "{dernet} build --profile {profile} 2>&1 | tee -i {log}"


# One job per network and fold. The rules see only its marker file in trained/; the job itself keeps
# the checkpoint in weights/, named by a digest of everything that shapes it, and the probabilities
# in tables/triage/. The slowest network starts first, so that no core is idle at the end.
for rank, network in enumerate(graph.QUICKEST_FIRST, start=len(chapters)):

    rule:
        name:
            f"train_{network}"
        output:
            touch(f"trained/{network}-{{fold,[0-9]+}}"),
        params:
            digest=partial(train_digest, network),
            network=network,
        # Two trainings in parallel, on half of the cores each, take less time than one after the
        # other on all of them.
        threads: max(1, every_core // 2)
        priority: rank
        benchmark:
            f"benchmarks/train_{network}-{{fold}}.tsv"
        log:
            f"logs/train_{network}-{{fold}}.log",
        shell:
            "env {compute} {dernet} train {params.network} --fold {wildcards.fold}"
            " --profile {profile} --threads {threads} 2>&1 | tee -i {log}"

    # With another seed: the spread between trainings.
    rule:
        name:
            f"train_{network}_again"
        output:
            touch(f"trained/{network}-{{fold}}-{{seed}}"),
        params:
            digest=partial(train_digest, network),
            network=network,
        threads: max(1, every_core // 2)
        benchmark:
            f"benchmarks/train_{network}-{{fold}}-{{seed}}.tsv"
        log:
            f"logs/train_{network}-{{fold}}-{{seed}}.log",
        shell:
            "env {compute} {dernet} train {params.network} --fold {wildcards.fold} --seed {wildcards.seed}"
            " --profile {profile} --threads {threads} 2>&1 | tee -i {log}"


# Chapter 10 trains the detector before the reader's eyes; this job does so without a chapter.
rule train_detector:
    output:
        touch("trained/yolo11l"),
    params:
        digest=lambda wildcards: graph.detector_digest(workspace),
    threads: every_core
    benchmark:
        "benchmarks/train_yolo11l.tsv"
    log:
        "logs/train_yolo11l.log",
    shell:
        "env {compute} {dernet} train yolo11l --profile {profile} --threads {threads} 2>&1 | tee -i {log}"


# All trainings of a run, for the edition.
rule trainings:
    input:
        expand("trained/{job}", job=graph.trainings(workspace)),


# Chapters that wait for no other job start before the trainings, since one of them trains too; the
# others start after them.
for chapter in chapters:

    rule:
        name:
            f"chapter_{chapter}"
        input:
            [
                f"trained/{network}-{fold}"
                for network, fold in graph.trainings_of(chapter, workspace.profile.held_out)
            ],
            [f"chapters/{before}.ipynb" for before in graph.chapter_needs(chapter).after],
        output:
            f"chapters/{chapter}.ipynb",
        params:
            digest=graph.chapter_digest(chapter, workspace),
            chapter=chapter,
        priority: priorities[chapter]
        benchmark:
            f"benchmarks/{chapter}.tsv"
        log:
            f"logs/{chapter}.log",
        threads: graph.cores_for(chapter, every_core)
        shell:
            "{dernet} chapter {params.chapter} --profile {profile} --threads {threads} 2>&1 | tee -i {log}"


# Not an input of other rules, because each change would then run every chapter again. The data are
# part of each chapter's own digest.
rule prepare:
    output:
        touch("prepared"),
    params:
        digest=graph.prepare_digest(workspace),
    threads: every_core
    benchmark:
        "benchmarks/prepare.tsv"
    log:
        "logs/prepare.log",
    shell:
        "{dernet} prepare --profile {profile} --workers {threads} 2>&1 | tee -i {log}"
