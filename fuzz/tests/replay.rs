//! Every input of the corpora, and mutations of them.

use std::path::Path;

use ice_fuzz::TARGETS;

/// Mutations of each target.
const MUTATIONS: u64 = 20_000;

/// xorshift64*, from Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled", 2016.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % limit.max(1)
    }
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn every_input_of_the_corpora() {
    for (name, target) in TARGETS {
        let inputs = corpus(name);
        assert!(inputs.len() >= 10, "the corpus {name} has {} inputs", inputs.len());
        inputs.iter().for_each(|input| target(input));
    }
}

#[test]
fn mutations() {
    let seed = std::env::var("ICE_SEED")
        .map_or_else(|_| u64::from(std::process::id()), |seed| seed.parse().unwrap());
    println!("ICE_SEED={seed}");
    for (name, target) in TARGETS {
        let inputs = corpus(name);
        let mut random = Random(seed | 1);
        for _ in 0..MUTATIONS {
            let mut input = inputs[random.below(inputs.len())].clone();
            for _ in 0..=random.below(4) {
                let at = random.below(input.len());
                match random.below(4) {
                    0 => input.truncate(at),
                    1 if !input.is_empty() => input[at] = random.below(256) as u8,
                    2 => input.insert(at, random.below(256) as u8),
                    _ => {
                        let other = &inputs[random.below(inputs.len())];
                        input.extend(&other[random.below(other.len())..]);
                    }
                }
            }
            target(&input);
        }
    }
}
