use std::fs;

use ::parquet::basic::{Compression, ZstdLevel};
use ::parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
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

/// Rows numbered from `start`, in groups of these sizes.
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
        // Some damage cannot be seen. What is seen names the file.
        if let Err(error) = read() {
            assert!(error.to_string().contains("x.parquet"), "{error}");
        }
    }
}
