//! Every input that is kept, and some noise, through its target: without libFuzzer and sanitizers, on any toolchain.

use std::path::Path;

use viaduct_fuzz::TARGETS;

#[test]
fn inputs_that_are_kept() {
    for (name, target) in TARGETS {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let inputs = std::fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
        let mut count = 0;
        for input in inputs {
            let path = input.expect("a directory entry").path();
            let bytes = std::fs::read(&path).expect("a readable file");
            println!("{}", path.display());
            let _ = target(&bytes);
            count += 1;
        }
        assert!(count > 0, "{name} has no inputs");
    }
}

#[test]
fn noise() {
    let mut state = 1u64;
    for (name, target) in TARGETS {
        for round in 0..200 {
            let bytes: Vec<u8> = (0..1 + round * 5)
                .map(|_| {
                    // Knuth's MMIX generator.
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state >> 56) as u8
                })
                .collect();
            println!("{name}, round {round}");
            let _ = target(&bytes);
        }
    }
}
