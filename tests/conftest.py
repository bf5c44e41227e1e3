"""Options of all tests, which pytest knows of only where they stand above what it is asked for."""


def pytest_addoption(parser):
    parser.addoption("--measured", help="a folder that gets what a published table is made of")
    parser.addoption(
        "--part", help="K/N: of the layouts of the gradient table every N-th, from the K-th on"
    )
