"""What people start: the commands of `hf-transmiter`, the demo and the app.

In reading order: `main` (which commands there are, and the entry point), `options` (settings to command-line options,
and what goes to stderr), `output` (where results go), `method` (tune, extract, bridge, transfer, evaluate), `compare`,
`hub`, `bench`, `demo`, `app` and `app_page` (the rest).
"""
