"""`python -m fairseq_deq.tools.diagnose`."""

from .command import cli_main

cli_main()
