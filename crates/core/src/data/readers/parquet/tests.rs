use std::fs;

use ::parquet::basic::{Compression, ZstdLevel};
use ::parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int32Type, Int64Type, Int96, Int96Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;

use super::*;
use crate::data::Pass;

const SCHEMA: &str = "message rows {
    required int64 id;
    optional binary text (UTF8);
    required double score;
    required group tokens (LIST) { repeated group list { required int64 element; } }
}";

/// Writes rows numbered from `start`, in groups of these sizes.
fn write(path: &Path, compression: Compression, start: i64, groups: &[i64]) {
    let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut file = SerializedFileWriter::new(fs::File::create(path).unwrap(), schema, properties).unwrap();
    let mut start = start;
    for &rows in groups {
        let ids: Vec<i64> = (start..start + rows).collect();
        start += rows;
        let mut group = file.next_row_group().unwrap();
        let mut number = 0;
        while let Some(mut column) = group.next_column().unwrap() {
            match number {
                0 => column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap(),
                1 => {
                    let texts: Vec<ByteArray> = ids
                        .iter()
                        .filter(|&id| id % 3 != 0)
                        .map(|id| format!("row {id}").as_str().into())
                        .collect();
                    let there: Vec<i16> = ids.iter().map(|id| i16::from(id % 3 != 0)).collect();
                    column.typed::<ByteArrayType>().write_batch(&texts, Some(&there), None).unwrap()
                }
                2 => {
                    let scores: Vec<f64> = ids.iter().map(|&id| id as f64 / 2.0).collect();
                    column.typed::<DoubleType>().write_batch(&scores, None, None).unwrap()
                }
                _ => {
                    let tokens: Vec<i64> = ids.iter().flat_map(|&id| [id, -id]).collect();
                    let (there, repeated) = (vec![1; tokens.len()], [0, 1].repeat(ids.len()));
                    column.typed::<Int64Type>().write_batch(&tokens, Some(&there), Some(&repeated)).unwrap()
                }
            };
            number += 1;
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    file.close().unwrap();
}

fn get(rows: &Parquet, index: usize) -> Result<Row> {
    rows.get(index, &mut Pass::new(0, 0).rng(0))
}

#[test]
fn rows_of_several_files_and_groups_are_had_by_index_and_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b", "c"].map(|name| folder.path().join(name));
    write(&paths[0], Compression::SNAPPY, 0, &[4, 3]);
    write(&paths[1], Compression::ZSTD(ZstdLevel::default()), 7, &[5]);
    write(&paths[2], Compression::UNCOMPRESSED, 12, &[1, 1, 6]);
    for keep in [1, 2, 9] {
        let rows = Parquet::open(paths.clone()).unwrap().keep(keep);
        assert_eq!(Items::len(&rows), 20);
        for index in (0..20).chain((0..20).rev()).chain([3, 17, 5, 12]) {
            let row = get(&rows, index).unwrap();
            let id = index as i64;
            assert_eq!(row.int("id").unwrap(), id);
            assert_eq!(row.float("score").unwrap(), id as f64 / 2.0);
            assert_eq!(row.ints("tokens").unwrap(), [id, -id]);
            match index % 3 {
                0 => assert_eq!(row.cell("text").unwrap(), &Cell::Null),
                _ => assert_eq!(row.text("text").unwrap(), format!("row {id}")),
            }
            assert!(lock(&rows.decoded).len() <= keep);
        }
        let mut ids = Vec::new();
        for shard in 0..rows.shards() {
            for found in rows.open(shard).unwrap() {
                ids.push(rows.load(found.unwrap(), &mut Pass::new(0, 0).rng(0)).unwrap().int("id").unwrap());
            }
        }
        assert_eq!((ids, rows.samples()), (Vec::from_iter(0..20), Some(20)));
    }
}

#[test]
fn columns_are_chosen_by_name_and_what_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    write(&path, Compression::SNAPPY, 0, &[4]);
    let all = Parquet::open([&path]).unwrap();
    let some = Parquet::open([&path]).unwrap().columns(&["tokens", "id"]).unwrap();
    assert_ne!(all.fingerprint(), some.fingerprint());
    let row = get(&some, 2).unwrap();
    assert_eq!((row.int("id").unwrap(), row.ints("tokens").unwrap()), (2, vec![2, -2]));
    let message = row.text("text").unwrap_err().to_string();
    assert!(message.contains("no column `text`; there are"), "{message}");
    let message = get(&all, 1).unwrap().float("text").unwrap_err().to_string();
    assert_eq!(message, "column `text` has text and not a number");
    let message = Parquet::open([&path]).unwrap().columns(&["name"]).err().unwrap().to_string();
    assert!(
        message.contains("x.parquet") && message.contains("no column `name`; there are id, text"),
        "{message}"
    );
}

#[test]
fn files_that_are_cut_off_or_damaged_are_errors_that_name_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    write(&path, Compression::SNAPPY, 0, &[4, 3]);
    let whole = fs::read(&path).unwrap();
    let read = || {
        Parquet::open([&path])
            .and_then(|rows| (0..7).map(|index| get(&rows, index)).collect::<Result<Vec<_>>>())
    };
    assert_eq!(read().unwrap().len(), 7);
    for len in (0..whole.len()).step_by(7) {
        fs::write(&path, &whole[..len]).unwrap();
        let message = read().unwrap_err().to_string();
        assert!(message.contains("x.parquet"), "{message}");
    }
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x41;
        fs::write(&path, bytes).unwrap();
        // Some damage cannot be detected. An error names the file.
        if let Err(error) = read() {
            assert!(error.to_string().contains("x.parquet"), "{error}");
        }
    }
}

/// Schema of images and boxes in Hugging Face datasets, and of times written by pyarrow 26.
const NESTED: &str = "message rows {
    optional group image { optional binary bytes; optional binary path (UTF8); }
    optional group boxes (LIST) { repeated group list { optional group element { optional int64 x; } } }
    required int64 ms (TIMESTAMP(MILLIS,false));
    required int64 ms_utc (TIMESTAMP(MILLIS,true));
    required int64 us (TIMESTAMP(MICROS,false));
    required int64 ns (TIMESTAMP(NANOS,false));
    required int32 time_ms (TIME(MILLIS,false));
    required int64 time_ns (TIME(NANOS,false));
    required int96 spark;
}";

/// Writes two rows: one with an image and two boxes, one with neither an image nor boxes.
fn write_nested(path: &Path) {
    let schema = Arc::new(parse_message_type(NESTED).unwrap());
    let mut file =
        SerializedFileWriter::new(fs::File::create(path).unwrap(), schema, Arc::default()).unwrap();
    let mut group = file.next_row_group().unwrap();
    let bytes = |text: &str| [ByteArray::from(text)];
    // A second and a millisecond after 1970-01-01, which is Julian day 2440588.
    let spark = [1_001_000_000_u64, 2_002_000_000]
        .map(|nanos| Int96::from(vec![(nanos & 0xffff_ffff) as u32, (nanos >> 32) as u32, 2_440_588]));
    for number in 0.. {
        let Some(mut column) = group.next_column().unwrap() else { break };
        match number {
            0 => column.typed::<ByteArrayType>().write_batch(&bytes("abc"), Some(&[2, 0]), None),
            1 => column.typed::<ByteArrayType>().write_batch(&bytes("a.png"), Some(&[2, 0]), None),
            2 => column.typed::<Int64Type>().write_batch(&[7, 8], Some(&[4, 4, 1]), Some(&[0, 1, 0])),
            3 | 4 => column.typed::<Int64Type>().write_batch(&[1_001, 2_002], None, None),
            5 => column.typed::<Int64Type>().write_batch(&[1_001_000, 2_002_000], None, None),
            7 => column.typed::<Int32Type>().write_batch(&[1_001, 2_002], None, None),
            9 => column.typed::<Int96Type>().write_batch(&spark, None, None),
            _ => column.typed::<Int64Type>().write_batch(&[1_001_000_000, 2_002_000_999], None, None),
        }
        .unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    file.close().unwrap();
}

#[test]
fn structs_and_lists_of_structs_are_read_by_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    write_nested(&path);
    let all = Parquet::open([&path]).unwrap();
    let some = Parquet::open([&path]).unwrap().columns(&["image.path", "boxes", "image.bytes"]).unwrap();
    for rows in [&all, &some] {
        let row = get(rows, 0).unwrap();
        assert_eq!(
            (row.bytes("image.bytes").unwrap(), row.text("image.path").unwrap()),
            (&b"abc"[..], "a.png")
        );
        let Cell::List(boxes) = row.cell("boxes").unwrap() else { panic!("{row:?}") };
        let xs: Vec<_> = boxes.iter().map(|found| found.field("x").unwrap()).collect();
        assert_eq!(xs, [&Cell::Int(7), &Cell::Int(8)]);
        let row = get(rows, 1).unwrap();
        assert_eq!(row.cell("image").unwrap(), &Cell::Null);
        assert_eq!(row.cell("image.bytes").unwrap(), &Cell::Null);
        assert_eq!(row.cell("boxes").unwrap(), &Cell::List(Vec::new()));
    }
    let message = get(&some, 0).unwrap().text("image.name").unwrap_err().to_string();
    assert_eq!(message, "no column `image.name`; there are image.path, image.bytes, boxes");
    let message = get(&all, 0).unwrap().bytes("image").unwrap_err().to_string();
    assert_eq!(message, "column `image` has a struct and not bytes");
    let one = Parquet::open([&path]).unwrap().columns(&["image.path"]).unwrap();
    let expected = Cell::Struct(vec![("path".into(), Cell::Text("a.png".into()))]);
    assert_eq!(get(&one, 0).unwrap().cell("image").unwrap(), &expected);
    let message = Parquet::open([&path]).unwrap().columns(&["image.name"]).err().unwrap().to_string();
    assert!(message.contains("no column `name`; there are bytes, path"), "{message}");
}

#[test]
fn times_are_in_microseconds_whatever_unit_the_file_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    write_nested(&path);
    let rows = Parquet::open([&path]).unwrap();
    for (index, micros) in [(0, 1_001_000), (1, 2_002_000)] {
        let row = get(&rows, index).unwrap();
        for column in ["ms", "ms_utc", "us", "ns", "time_ms", "time_ns", "spark"] {
            assert_eq!(row.int(column).unwrap(), micros, "{column}");
        }
    }
    assert_eq!(schema::Unit::Nanos.to_micros(-1), Some(-1));
    assert_eq!(schema::Unit::Millis.to_micros(i64::MAX), None);
}

#[test]
fn codec_that_is_not_built_in_is_named_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    write(&path, Compression::UNCOMPRESSED, 0, &[4]);
    let whole = fs::read(&path).unwrap();
    // The bytes in Thrift's compact protocol: a list of one string, which is the path, followed by
    // the codec.
    let codec = [0x19, 0x18, 2, b'i', b'd', 0x15, 0];
    let at = whole.windows(codec.len()).position(|bytes| bytes == codec).unwrap();
    for (number, name) in [(2, "gzip"), (4, "brotli"), (5, "LZ4"), (7, "LZ4")] {
        let mut bytes = whole.clone();
        bytes[at + codec.len() - 1] = 2 * number;
        fs::write(&path, bytes).unwrap();
        let message = Parquet::open([&path]).err().unwrap().to_string();
        assert!(message.contains(&format!("x.parquet: column `id` is compressed with {name}")), "{message}");
        assert!(message.contains("compression=\"zstd\""), "{message}");
    }
}
