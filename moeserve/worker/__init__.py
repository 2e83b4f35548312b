"""The expert worker's process: the `worker` subcommand."""
