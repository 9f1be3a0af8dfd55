"""The book's rules: the chapters beside one another, then the pages; before them, the data.

`dernet run` calls this. On a cluster, call Snakemake itself with one of its executor plug-ins, first
for the data, then for the book:

    snakemake prepare --config profile=paper --rerun-triggers params --executor slurm --jobs 8
    snakemake book --config profile=paper --rerun-triggers params --executor slurm --jobs 8

Each rule's digest is a parameter; with --rerun-triggers params a rule runs again when the contents
it depends on have changed, and file times do not count.
"""

import sys

from dernet_utils.book import graph
from dernet_utils.core.workspace import open_workspace

workspace = open_workspace(config.get("profile", ""))
profile = workspace.profile.name
dernet = f"'{sys.executable}' -m dernet_utils.cli"
priorities = graph.priorities(graph.chapter_names())
chapters = list(priorities)
compute = " ".join(f"{name}={value}" for name, value in graph.TRAINING_ENVIRONMENT.items())
# Snakemake frees more cores than it has, and starts two trainings at once, where a rule asks for more.
every_core = min(workflow.cores or graph.MAX_THREADS, graph.MAX_THREADS)


workdir: str(workspace.folder)


rule book:
    input:
        expand("chapters/{chapter}.ipynb", chapter=chapters),
    output:
        "book/_build/html/index.html",
    params:
        digest=graph.book_digest(workspace),
    shell:
        "{dernet} build --profile {profile} 2>&1"


# A network and a fold are one job. Its mark is all that the rules know of it; checkpoint and
# checkpoint under the digest of all that shapes it, in weights/, probabilities in tables/triage/. The network that takes
# longest comes first, so that no core waits at the end while another trains alone.
for rank, network in enumerate(graph.QUICKEST_FIRST, start=len(chapters)):

    rule:
        name:
            f"train_{network}"
        output:
            touch(f"trained/{network}-{{fold}}"),
        params:
            digest=lambda _: graph.train_digest(workspace),
            network=network,
        # Two trainings abreast, each on half of the cores, take less time than one after the other
        # on all of them.
        threads: max(1, every_core // 2)
        priority: rank
        benchmark:
            f"benchmarks/train_{network}-{{fold}}.tsv"
        shell:
            "env {compute} {dernet} train {params.network} --fold {wildcards.fold}"
            " --profile {profile} --threads {threads} 2>&1"


# The chapters that wait for no other job begin before the trainings do: one of them trains too. The
# others come after them; what is left then takes all cores to the end.
for chapter in chapters:

    rule:
        name:
            f"chapter_{chapter}"
        input:
            [
                f"trained/{network}-{fold}"
                for network, fold in graph.trainings_of(chapter, workspace.profile.folds)
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
        threads: graph.cores_for(chapter, every_core)
        shell:
            "{dernet} chapter {params.chapter} --profile {profile} --threads {threads} 2>&1"


# No rule's input: as one, whatever it depends on would run every chapter again. What a chapter takes
# from the data is in the chapter's own digest.
rule prepare:
    output:
        touch("prepared"),
    params:
        digest=graph.prepare_digest(workspace),
    threads: every_core
    benchmark:
        "benchmarks/prepare.tsv"
    shell:
        "{dernet} prepare --profile {profile} --workers {threads} 2>&1"
