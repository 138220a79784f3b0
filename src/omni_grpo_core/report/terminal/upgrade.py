def print_upgrade(console, report):
    console.print(report.verdict, report.why)
