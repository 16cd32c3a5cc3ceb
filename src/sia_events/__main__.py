from sia_events.cli import main

main()
