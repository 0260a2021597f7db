//! Compares two checkpoints.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Result;
use half::{bf16, f16};
use ice_checkpoint::{Checkpoint, Section};
use safetensors::Dtype;
use serde::Serialize;

#[derive(Debug, Serialize)]
#[serde(tag = "what", rename_all = "snake_case")]
enum Difference {
    OnlyInA { key: String },
    OnlyInB { key: String },
    Kind { key: String, a: String, b: String },
    Values { key: String, max_abs_difference: Option<f64> },
}

pub(crate) fn diff(a: &Path, b: &Path, json: bool) -> Result<bool> {
    let (a, b) = (Checkpoint::open(a)?, Checkpoint::open(b)?);
    let mut differences = Vec::new();
    let mut same = 0_usize;
    for section in Section::ALL {
        let (ours, theirs) = (a.catalog().section(section), b.catalog().section(section));
        for key in ours.keys().chain(theirs.keys()).collect::<BTreeSet<_>>() {
            let key = key.clone();
            let difference = match (ours.get(&key), theirs.get(&key)) {
                (Some(_), None) => Difference::OnlyInA { key },
                (None, _) => Difference::OnlyInB { key },
                (Some(one), Some(other)) if (one.dtype, &one.shape) != (other.dtype, &other.shape) => {
                    let text = |saved: &ice_checkpoint::Saved| format!("{:?} {:?}", saved.dtype, saved.shape);
                    Difference::Kind { key, a: text(one), b: text(other) }
                }
                (Some(saved), Some(_)) => {
                    let (one, other) = (a.tensor(section, &key)?, b.tensor(section, &key)?);
                    if one == other {
                        same += 1;
                        continue;
                    }
                    Difference::Values { key, max_abs_difference: max_difference(saved.dtype, &one, &other) }
                }
            };
            differences.push(difference);
        }
    }
    for difference in &differences {
        if json {
            println!("{}", serde_json::to_string(difference)?);
            continue;
        }
        match difference {
            Difference::OnlyInA { key } => println!("- {key}"),
            Difference::OnlyInB { key } => println!("+ {key}"),
            Difference::Kind { key, a, b } => println!("! {key}  {a} / {b}"),
            Difference::Values { key, max_abs_difference: Some(most) } => {
                println!("~ {key}  at most {most:e}")
            }
            Difference::Values { key, max_abs_difference: None } => println!("~ {key}  in its bytes"),
        }
    }
    if !json {
        println!("{same} tensors are the same to the bit, {} differ", differences.len());
    }
    Ok(differences.is_empty())
}

/// Returns the largest absolute difference between two elements at the same place. Returns `None`
/// if the elements are of a type that this tool does not read as numbers.
///
/// If only one of two elements is NaN, or their NaNs have different bytes, the difference is
/// infinite.
fn max_difference(dtype: Dtype, a: &[u8], b: &[u8]) -> Option<f64> {
    fn most<const N: usize>(a: &[u8], b: &[u8], number: impl Fn([u8; N]) -> f64) -> f64 {
        let (a, b) = (a.as_chunks::<N>().0, b.as_chunks::<N>().0);
        let difference = |(a, b): (&[u8; N], &[u8; N])| match (number(*a), number(*b)) {
            _ if a == b => 0.0,
            (a, b) if a.is_nan() || b.is_nan() => f64::INFINITY,
            (a, b) => (a - b).abs(),
        };
        a.iter().zip(b).map(difference).fold(0.0, f64::max)
    }
    Some(match dtype {
        Dtype::F64 => most(a, b, f64::from_le_bytes),
        Dtype::F32 => most(a, b, |x| f32::from_le_bytes(x).into()),
        Dtype::F16 => most(a, b, |x| f16::from_le_bytes(x).into()),
        Dtype::BF16 => most(a, b, |x| bf16::from_le_bytes(x).into()),
        Dtype::I64 => most(a, b, |x| i64::from_le_bytes(x) as f64),
        Dtype::U64 => most(a, b, |x| u64::from_le_bytes(x) as f64),
        Dtype::I32 => most(a, b, |x| i32::from_le_bytes(x).into()),
        Dtype::U32 => most(a, b, |x| u32::from_le_bytes(x).into()),
        Dtype::I16 => most(a, b, |x| i16::from_le_bytes(x).into()),
        Dtype::U16 => most(a, b, |x| u16::from_le_bytes(x).into()),
        Dtype::I8 => most(a, b, |x| i8::from_le_bytes(x).into()),
        Dtype::U8 | Dtype::BOOL => most(a, b, |x: [u8; 1]| x[0].into()),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_those_of_the_numbers() {
        let bytes = |x: [f32; 2]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
        assert_eq!(max_difference(Dtype::F32, &bytes([1.0, -2.0]), &bytes([1.5, 1.0])), Some(3.0));
        assert_eq!(max_difference(Dtype::F32, &bytes([f32::NAN, 0.0]), &bytes([f32::NAN, 0.5])), Some(0.5));
        let half = |x: f32| bf16::from_f32(x).to_le_bytes();
        assert_eq!(max_difference(Dtype::BF16, &half(1.0), &half(-1.0)), Some(2.0));
        assert_eq!(max_difference(Dtype::C64, &[0; 8], &[1; 8]), None);
    }
}
