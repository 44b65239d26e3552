"""``deepseek-generate``: let a trained model go on with a text. One process, on CPU or one GPU.

usage: deepseek-generate source=FOLDER prompt=TEXT [key=value ...]

  source=runs/tiny        a run (its newest whole checkpoint), one of its checkpoints, or an export for Hugging Face
  prompt="import numpy"   the text to go on with; prompt=- reads it from standard input
  tokens=64               at most so many; it ends before where the model ends the text
  temperature=0.6         0: always the likeliest token; 1: as likely as the model has it
  top_p=0.95              only among the likeliest tokens that together have this probability; 1: among all
  seed=0                  the same seed gives the same text
  ema=false               true: the averaged weights of a checkpoint instead of the last
  bos=false               true: begin with the tokenizer's first token, as DeepSeek's published models want it; models
                          trained here have never seen it
  tokenizer=null          a tokenizer.json, or builtin; null: the one that lies with the weights
  context=null            tokens of prompt and answer together, at most; null: what the model was trained with
  device=auto             cpu, cuda, or auto: a GPU if there is one
  dtype=auto              fp32, bf16, or auto: fp32 on CPUs, bf16 on GPUs

The answer goes to standard output as it is made, nothing else does. How fast it was goes to standard error.

A token that has been read is kept as MLA's latent and shared key, kv_lora_rank + qk_rope_head_dim numbers a layer
(DeepSeek-V3: 576 instead of 40,960; 70 KB a token in bf16), not as the keys and values of all heads.

examples:
  deepseek-generate source=runs/tiny prompt="import numpy as np" tokens=64
  deepseek-generate source=runs/tiny/checkpoints/step-00000100 prompt="def " temperature=0
  deepseek-generate source=exports/tiny prompt=- context=256 <program.py

exit codes: 0 done; 2 something is wrong with the arguments or with what source holds, and the message says what.
"""

import sys
import time
from collections.abc import Sequence

import torch

from deepseek_train.checkpoint.errors import CheckpointError
from deepseek_train.cli.answer import answer
from deepseek_train.cli.generate_request import understand
from deepseek_train.cli.key_value import UsageError
from deepseek_train.generate.continuation import NotFinite, continuation
from deepseek_train.generate.load import decoding_stage
from deepseek_train.generate.stream import TextStream
from deepseek_train.model.decode import cached_elements
from deepseek_train.parallel.expert.announce import RoutingFault


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code. ``arguments`` defaults to the command line."""
    return answer("deepseek-generate", __doc__, sys.argv[1:] if arguments is None else arguments, _say)


def _say(words: Sequence[str]) -> None:
    begun = time.monotonic()
    task = understand(words)
    try:
        stage = decoding_stage(task.weights, task.length, task.device, task.dtype)
    except (CheckpointError, OSError) as error:  # its run may have deleted it meanwhile
        raise UsageError([f"{task.name} cannot be read: {error}"]) from error
    loaded = time.monotonic()
    ids = continuation(
        stage,
        task.prompt_ids,
        task.tokens,
        task.sampling,
        seed=task.seed,
        stop=task.tokenizer.special.eos,
        vocab_size=task.tokenizer.vocab_size,
    )
    stream, made = TextStream(task.tokenizer), 0
    try:
        for token in ids:
            made += 1
            print(stream.add(token), end="", flush=True)
    except (NotFinite, RoutingFault) as fault:
        raise UsageError([f"{task.name} cannot generate: {fault}"]) from fault
    print(stream.end())
    seconds, kept = time.monotonic() - loaded, len(task.prompt_ids) + made
    size = cached_elements(stage.context.model) * torch.finfo(task.dtype).bits // 8
    print(
        f"{task.name}: loaded in {loaded - begun:.1f} s; {made} tokens in {seconds:.1f} s, "
        f"{made / seconds:.1f} a second; {kept} kept, {size:,} bytes each",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
