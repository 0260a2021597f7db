//! The grammar of `--devices`.
//!
//! ```text
//! devices := kind [ ":" indices ]      kind    := "auto" | "cpu" | "cuda"
//! indices := "*" | range { "," range } range   := number [ "-" number ]
//! ```

use std::fs;

use ice_proto::backend::RankDevice;

use crate::placement::visible_devices;

/// Limit for the ranks of one node. No node has that many devices, so a larger number is a typing
/// error.
pub(super) const MOST: u32 = 4096;
const GRAMMAR: &str =
    "expected auto, cpu, cuda, cuda:*, or indices such as cuda:0, cuda:1,3, cuda:0-2,7, cpu:0-3";

/// Returns the devices that a text names, one per rank. `gpus` is the number of CUDA devices of
/// this node.
pub(super) fn parse(text: &str, gpus: u32) -> Result<Vec<RankDevice>, String> {
    let (kind, indices) = match text.split_once(':') {
        Some((kind, indices)) => (kind, Some(indices)),
        None => (text, None),
    };
    let cuda = match kind {
        "cpu" => false,
        "cuda" => true,
        "auto" => gpus > 0,
        _ => return Err(format!("`{kind}` is not a kind of device: {GRAMMAR}")),
    };
    let indices = match indices {
        None if text == "cuda" || !cuda => vec![0],
        None | Some("*") if cuda => (0..gpus).collect(),
        Some("*") => vec![0],
        Some(list) => expand(list)?,
        None => vec![0],
    };
    if !cuda {
        return Ok(indices.iter().map(|_| RankDevice::Cpu).collect());
    }
    match indices.iter().find(|index| **index >= gpus) {
        _ if gpus == 0 => Err("this node has no CUDA device: use --devices cpu, or check nvidia-smi".into()),
        Some(index) => {
            Err(format!("there is no cuda:{index}: this node has {gpus} CUDA devices, from cuda:0"))
        }
        None => Ok(indices.into_iter().map(RankDevice::Cuda).collect()),
    }
}

fn expand(list: &str) -> Result<Vec<u32>, String> {
    let mut indices = Vec::new();
    for part in list.split(',') {
        let wrong = || format!("`{part}` is not an index or a range: {GRAMMAR}");
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
            true => text.parse::<u32>().map_err(|_| wrong()),
            false => Err(wrong()),
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= MOST {
            return Err(wrong());
        }
        indices.extend(first..=last);
        if indices.len() > MOST as usize {
            return Err(format!("more than {MOST} ranks on one node"));
        }
    }
    Ok(indices)
}

/// Returns the number of CUDA devices that a rank would see, without loading CUDA.
pub(super) fn count_gpus() -> u32 {
    let installed = fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, |entries| entries.count());
    let installed = u32::try_from(installed).unwrap_or(u32::MAX);
    match visible_devices() {
        Some(list) => {
            let visible =
                list.split(',').map(str::trim).take_while(|id| !id.is_empty() && *id != "-1").count();
            installed.min(u32::try_from(visible).unwrap_or(u32::MAX))
        }
        None => installed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str, gpus: u32) -> String {
        let devices = parse(text, gpus).unwrap();
        devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn every_form_of_the_grammar() {
        for (text, gpus, expected) in [
            ("auto", 0, "cpu"),
            ("auto", 2, "cuda:0 cuda:1"),
            ("auto:*", 2, "cuda:0 cuda:1"),
            ("auto:*", 0, "cpu"),
            ("cpu", 2, "cpu"),
            ("cuda", 2, "cuda:0"),
            ("cuda:0", 2, "cuda:0"),
            ("cuda:*", 3, "cuda:0 cuda:1 cuda:2"),
            ("cuda:1,3", 4, "cuda:1 cuda:3"),
            ("cuda:0-2,7", 8, "cuda:0 cuda:1 cuda:2 cuda:7"),
            ("cuda:0,0", 1, "cuda:0 cuda:0"),
            ("cpu:0-3", 0, "cpu cpu cpu cpu"),
        ] {
            assert_eq!(names(text, gpus), expected, "{text} with {gpus} GPUs");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, gpus, named) in [
            ("tpu", 0, "`tpu`"),
            ("cpu:", 0, "``"),
            ("cpu:1-", 0, "`1-`"),
            ("cpu:3-1", 0, "`3-1`"),
            ("cpu:0,x", 0, "`x`"),
            ("cpu:0-99999999", 0, "`0-99999999`"),
            ("cpu:0-4095,0", 0, "more than 4096"),
            ("cpu:+1", 0, "`+1`"),
            ("cuda", 0, "no CUDA device"),
            ("cuda:9", 2, "no cuda:9"),
        ] {
            let error = parse(text, gpus).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
