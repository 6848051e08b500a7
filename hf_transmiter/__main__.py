"""`python -m hf_transmiter`, the same as `hf-transmiter`; what `accelerate launch -m hf_transmiter COMMAND` runs."""

from .cli.main import main


if __name__ == "__main__":
    main()
