"""The errors a user can meet, each with the exit code of the `affekt` command."""


class AffektError(Exception):
    """A message that says what is wrong, where, and what to do. Base of all errors raised on purpose."""

    exit_code = 1


class SettingsError(AffektError):
    """A setting, argument or manifest that cannot be used."""


class DataError(AffektError):
    """Data that is damaged, missing, or over its budget of bad samples."""

    exit_code = 2


class CheckpointError(AffektError):
    """A checkpoint or export that is refused."""

    exit_code = 3


class HealthError(AffektError):
    """Training that cannot go on, such as a loss that stays non-finite."""

    exit_code = 4


class LostRankError(AffektError):
    """A process of the run that was killed, or that none of the others can wait for any longer."""

    exit_code = 5
