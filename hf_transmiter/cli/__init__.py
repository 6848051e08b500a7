"""What people start: the commands of `hf-transmiter`, the demo and the app.

In reading order: `reporting` (what goes to stderr), `options` and `arguments` (settings to command-line options),
`transfer`, `compare`, `hub`, `bench`, `app`, `demo` (the commands), `main` (the rest, and the entry point).
"""
