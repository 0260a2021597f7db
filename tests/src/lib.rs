//! End-to-end tests: see `tests/e2e/main.rs`. The library is empty. The package also contains
//! `rank`, the program that the tests and the start-up benchmark run as ranks.
