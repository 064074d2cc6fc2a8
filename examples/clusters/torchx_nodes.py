"""A training by TorchX: every replica is a node, and all of them meet at the first one.

Write node.sh into the run folder, which all nodes can write to, then run it by any scheduler:

    infoentropy launch RECIPE.yaml --data DATA --tokenizer TOKENIZER --run RUN \
        --nodes 2 --gpus-per-node 8 --rdzv-endpoint any:29500 --dry-run
    torchx run --scheduler slurm torchx_nodes.py:training --run RUN --nodes 2 --gpus 8
"""

import shlex

from torchx import specs


def training(
    run: str, nodes: int = 2, gpus: int = 8, cpu: int = 32, memory_mb: int = 262144, image: str = ""
) -> specs.AppDef:
    """Run node.sh on every node.

    Args:
        run: the run folder, which holds node.sh
        nodes: as many as `infoentropy launch` was told
        gpus: of a node
        cpu: CPUs of a node
        memory_mb: memory of a node, megabytes
        image: container with the package, for schedulers that take one
    """
    macros = specs.macros
    first = f"$${{{macros.rank0_env}:=localhost}}"  # some schedulers name it to all nodes but it
    command = f"NODE={macros.replica_id} RDZV_ENDPOINT={first}:29500 exec bash {shlex.quote(run)}"
    role = specs.Role(
        name="node",
        image=image,
        entrypoint="bash",
        args=["-c", f"{command}/node.sh"],
        num_replicas=nodes,
        resource=specs.Resource(cpu=cpu, gpu=gpus, memMB=memory_mb),
    )
    return specs.AppDef(name="training", roles=[role])
