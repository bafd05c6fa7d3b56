from moe_upgrpo.cli import main

main()
