"""The data of a training run: opened and held against its config before anything is started."""

from __future__ import annotations

from pathlib import Path

from milepost.config.schema import Config
from milepost.core.errors import DataError, UsageError
from milepost.data.shards import PreparedData, open_prepared


def open_run_data(config: Config) -> PreparedData:
    """Opens `data.path` and checks that its tokens fit the model; hashes are not read yet.

    Raises:
        UsageError: data.path is not set.
        DataError: it holds no prepared data, or token ids the model does not have.
    """
    if not config.data.path:
        raise UsageError(
            "data.path is not set",
            hint="add --data.path DIR, a folder that milepost data prepare wrote",
        )
    data = open_prepared(Path(config.data.path))
    if data.vocab_size != config.model.vocab_size:
        raise DataError(
            f"{data.folder} has a vocabulary of {data.vocab_size}, "
            f"the recipe's model.vocab_size is {config.model.vocab_size}",
            hint=f"prepare the data with another tokenizer, or set --model.vocab_size "
            f"{data.vocab_size}",
        )
    return data
