"""The statistics that a run's data give its codec: of the training episodes, or of the dataset's own file."""

from vlafit.agreement import describe_form
from vlafit.codec import Codec, CodecConfig
from vlafit.codec.codec_config import columns_of
from vlafit.codec.normaliser import NEEDED
from vlafit.codec.statistics import Statistics
from vlafit.datasets import recorded
from vlafit.datasets.statistics_cache import statistics_of
from vlafit.errors import ConfigError
from vlafit.train.data import Data

CHOICE = 'data.statistics = "file"'


def statistics_for(data: Data, config: CodecConfig) -> dict[str, Statistics]:
    """Return the statistics of "state" and "action" for the codec of one embodiment.

    Raises DataError as `statistics_of` and `recorded.of_file` do, ConfigError as `of_file` does.
    """
    if data.statistics == "file":
        return of_file(data, config)
    columns = columns_of(config, data.embodiment)
    stores, episodes = data.stores, data.training
    if (other := data.described_by) is not None:
        stores, episodes = (other,), (tuple(episode.id for episode in other.episodes),)
    return statistics_of(stores, episodes, config.chunk, columns=columns)


def of_file(data: Data, config: CodecConfig) -> dict[str, Statistics]:
    """Return the statistics that the file of the only dataset states, which are those of its rows.

    Raises ConfigError for several datasets, and for relative actions.
    """
    if len(data.stores) != 1:
        names = ", ".join(repr(card.name) for card in data.cards)
        raise ConfigError(f"{CHOICE} takes those of one dataset, and there are {names}; {recorded.FIX}")
    for name, form in (("state", config.state_form), ("action", config.action_form)):
        if not form.is_plain:
            raise ConfigError(
                f"{CHOICE}: the file's are of the {name} as it is stored, and the policy learns another form "
                f"of it ({describe_form(form)}); {recorded.FIX}"
            )
    if any(config.relative):
        raise ConfigError(
            f"{CHOICE}: the file's are of actions as they are stored, and the policy learns them relative to "
            f"the state; {recorded.FIX}, or leave the actions absolute"
        )
    return recorded.of_file(next(iter(data.stores)), _read_by(config))


def described(data: Data, codec: Codec) -> str:
    """Return in words which file's statistics the codec has, and what is unlike the rows and yet no error."""
    store = next(iter(data.stores))
    count = codec.statistics["state"].count
    rows = f", {count:,} rows" if count else ""
    compared = [f"{store.recorded_statistics().file}{rows}, compared with the rows"]
    return "; ".join(compared + recorded.quantile_notes(store, codec.statistics, _read_by(codec.config)))


def _read_by(config: CodecConfig) -> dict[str, tuple[str, ...]]:
    """Return the measures that the normalisation of each column reads."""
    return {"state": NEEDED.get(config.normalisation, ()), "action": NEEDED.get(config.of_actions, ())}
