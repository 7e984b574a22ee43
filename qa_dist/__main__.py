"""`python -m qa_dist`, which is what `accelerate launch -m qa_dist` starts on every process."""

from qa_dist.cli import main

if __name__ == "__main__":
    main()
