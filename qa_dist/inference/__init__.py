"""Using trained models: answers from Python, the command line and a page."""
