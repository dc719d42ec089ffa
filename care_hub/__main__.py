"""`python -m care_hub` is `care-hub`, also for `accelerate launch -m care_hub ...` and torchrun."""

from .cli import main

main()
