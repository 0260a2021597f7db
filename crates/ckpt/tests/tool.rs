//! Runs the tool as a user calls it.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use ice_checkpoint::{Counts, Entry, Layout, Manifest, Part, Section, Staging};
use safetensors::Dtype;

fn run(arguments: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_ice-ckpt")).args(arguments).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Writes a checkpoint: `net.w`, two by two, in one piece, and its first moments in two shards.
fn checkpoint(folder: &Path, w: [f32; 4]) {
    let staging = Staging::begin(folder, "test").unwrap();
    let mut files = BTreeMap::new();
    let mut write = |name: String, entry: Entry, values: &[f32]| {
        let layout = Layout::new(&[entry]).unwrap();
        files.insert(name.clone(), staging.write(&name, &[layout.header(), &floats(values)]).unwrap());
    };
    let entry = |key: &str, shape: &[u64], part| Entry {
        key: key.into(),
        dtype: Dtype::F32,
        shape: shape.into(),
        part,
    };
    write("model.safetensors".into(), entry("net.w", &[2, 2], None), &w);
    for rank in 0..2 {
        let part = Some(Part::rows(rank as u64, &[2, 2]));
        write(Section::Optimizer.shard(rank, 2), entry("net.w.exp_avg", &[1, 2], part), &[rank as f32, 9.0]);
    }
    let mut manifest = Manifest::new("job", 2, 7, Counts { train_steps: 5, ..Counts::default() }, ().into());
    manifest.files = files;
    staging.commit(&manifest).unwrap();
}

#[test]
fn a_checkpoint_goes_out_to_one_file_and_in_again() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name).to_str().unwrap().to_owned();
    checkpoint(&out.path().join("a"), [1.0, 2.0, 3.0, 4.0]);

    let (code, text) = run(&["export", &path("a"), &path("all.safetensors"), "--optimizer"]);
    assert_eq!(code, 0, "{text}");
    let bytes = fs::read(path("all.safetensors")).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.tensor("net.w.exp_avg").unwrap().data(), floats(&[0.0, 9.0, 1.0, 9.0]));
    assert_eq!(read.tensor("net.w.exp_avg").unwrap().shape(), [2, 2]);

    assert_eq!(run(&["export", &path("a"), &path("net.safetensors"), "--node", "net"]).0, 0);
    let (code, text) = run(&["import", &path("net.safetensors"), &path("b"), "--node", "net"]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = run(&["diff", &path("a"), &path("b")]);
    assert_eq!(
        (code, text.contains("- net.w.exp_avg"), text.contains("1 tensors are the same")),
        (1, true, true),
        "{text}"
    );
    assert_eq!(run(&["import", &path("net.safetensors"), &path("b")]).0, 1, "nothing is overwritten");
    assert_eq!(run(&["export", &path("a"), &path("net.safetensors")]).0, 1, "nothing is overwritten");
}

#[test]
fn differences_and_damage_are_named() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name).to_str().unwrap().to_owned();
    checkpoint(&out.path().join("a"), [1.0, 2.0, 3.0, 4.0]);
    checkpoint(&out.path().join("b"), [1.0, 2.0, 3.5, 4.0]);
    let (code, text) = run(&["diff", &path("a"), &path("b"), "--json"]);
    assert_eq!((code, text.trim()), (1, r#"{"what":"values","key":"net.w","max_abs_difference":0.5}"#));
    assert_eq!(run(&["diff", &path("a"), &path("a")]).0, 0);

    let (code, text) = run(&["list", &path(".")]);
    assert_eq!((code, text.matches(" job ").count()), (0, 2), "{text}");
    let (code, text) = run(&["inspect", &path("a"), "--keys"]);
    assert_eq!(code, 0);
    assert!(text.contains("net.w.exp_avg  F32 [2, 2] in 2 pieces"), "{text}");

    assert_eq!(run(&["verify", &path("a"), &path("b")]).0, 0);
    for (name, named) in [
        ("model.safetensors", "crc32c"),
        ("optimizer-00001-of-00002.safetensors", "crc32c"),
        ("manifest.json", "checksum"),
    ] {
        checkpoint(&out.path().join("c"), [0.0; 4]);
        let file = out.path().join("c").join(name);
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(&file, &bytes).unwrap();
        let (code, text) = run(&["verify", &path("a"), &path("c")]);
        assert_eq!((code, text.contains(name), text.contains(named)), (1, true, true), "{text}");
        bytes[middle] ^= 4;
        fs::write(&file, &bytes[..middle]).unwrap();
        let (code, text) = run(&["verify", &path("c")]);
        assert_eq!((code, text.contains(name)), (1, true), "{text}");
        fs::remove_file(&file).unwrap();
        let (code, text) = run(&["verify", &path("c")]);
        assert_eq!((code, text.contains(name)), (1, true), "{text}");
    }
}

#[test]
fn file_outside_of_the_checkpoint_and_fifo_are_damage() {
    let out = tempfile::tempdir().unwrap();
    let path = |name: &str| out.path().join(name).to_str().unwrap().to_owned();
    checkpoint(&out.path().join("a"), [1.0; 4]);
    let mut manifest = Manifest::read(&out.path().join("a")).unwrap();
    let info = ice_checkpoint::write_file(&out.path().join("outside"), &[b"abc"]).unwrap();
    manifest.files.insert("../outside".into(), info);
    fs::write(out.path().join("a/manifest.json"), manifest.to_bytes().unwrap()).unwrap();
    let (code, text) = run(&["verify", &path("a")]);
    assert_eq!((code, text.contains("outside: lies outside of its checkpoint")), (1, true), "{text}");

    for name in ["manifest.json", "model.safetensors"] {
        checkpoint(&out.path().join("b"), [1.0; 4]);
        let file = out.path().join("b").join(name);
        fs::remove_file(&file).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &file, rustix::fs::Mode::RWXU).unwrap();
        let (code, text) = run(&["verify", &path("b")]);
        assert_eq!((code, text.contains("is not a regular file")), (1, true), "{text}");
    }
    let file = fs::File::create(out.path().join("c.json")).unwrap();
    file.set_len(65 << 20).unwrap();
    fs::create_dir(out.path().join("c")).unwrap();
    fs::rename(out.path().join("c.json"), out.path().join("c/manifest.json")).unwrap();
    let (code, text) = run(&["verify", &path("c")]);
    assert_eq!((code, text.contains("a manifest may have")), (1, true), "{text}");
}
