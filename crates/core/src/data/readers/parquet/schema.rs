//! Types of columns: units of times, elements of lists, and the selection of columns.

use std::sync::Arc;

use ::parquet::basic::{Compression, ConvertedType, LogicalType, Repetition, TimeUnit};
use ::parquet::file::metadata::RowGroupMetaData;
use ::parquet::schema::types::{Type, TypePtr};

/// Unit of the integers of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// An integer that is not a time, or microseconds.
    Same,
    Millis,
    Nanos,
}

impl Unit {
    /// Returns the unit of a column whose values the decoder passes on as plain integers.
    ///
    /// The decoder only knows the older converted types. They do not have nanoseconds, and Arrow
    /// does not write them for times without a time zone.
    pub(super) fn of(kind: &Type) -> Self {
        match kind.get_basic_info().logical_type_ref() {
            Some(LogicalType::Timestamp(time) | LogicalType::Time(time)) => match time.unit {
                TimeUnit::MILLIS => Self::Millis,
                TimeUnit::MICROS => Self::Same,
                TimeUnit::NANOS => Self::Nanos,
            },
            _ => Self::Same,
        }
    }

    pub(super) fn to_micros(self, value: i64) -> Option<i64> {
        match self {
            Self::Same => Some(value),
            Self::Millis => value.checked_mul(1000),
            Self::Nanos => Some(value.div_euclid(1000)),
        }
    }
}

/// Returns the type of a list's elements, like the decoder determines it.
///
/// An annotated list has a repeated group around each element, except in files of old writers. A
/// repeated field without annotation is its own element.
pub(super) fn element(list: &Type) -> &Type {
    if list.is_primitive() || list.get_basic_info().converted_type() != ConvertedType::LIST {
        return list;
    }
    let [repeated] = list.get_fields() else { return list };
    if repeated.is_primitive() {
        return repeated;
    }
    let [only] = repeated.get_fields() else { return repeated };
    let of_lists = repeated.get_basic_info().converted_type() == ConvertedType::LIST
        || only.get_basic_info().repetition() == Repetition::REPEATED;
    let old = repeated.name() == "array" || repeated.name().ends_with("_tuple");
    if old && !of_lists { repeated } else { only }
}

/// Returns the fields that `paths` name, in this order: a column, or `column.field` of a struct.
pub(super) fn select(fields: &[TypePtr], paths: &[&str]) -> Result<Vec<TypePtr>, String> {
    let mut chosen: Vec<(&TypePtr, Vec<Option<&str>>)> = Vec::new();
    for &path in paths {
        let whole = fields.iter().find(|field| field.name() == path).map(|field| (field, None));
        let found = whole.or_else(|| {
            fields
                .iter()
                .filter(|field| is_struct(field))
                .find_map(|field| Some((field, Some(path.strip_prefix(field.name())?.strip_prefix('.')?))))
        });
        let (field, rest) = found.ok_or_else(|| {
            let there: Vec<_> = fields.iter().map(|field| field.name()).collect();
            format!("no column `{path}`; there are {}", there.join(", "))
        })?;
        match chosen.iter_mut().find(|(other, _)| Arc::ptr_eq(other, field)) {
            Some((_, rests)) => rests.push(rest),
            None => chosen.push((field, vec![rest])),
        }
    }
    chosen
        .into_iter()
        .map(|(field, rests)| match rests.into_iter().collect::<Option<Vec<_>>>() {
            None => Ok(Arc::clone(field)),
            Some(rests) => {
                let info = field.get_basic_info();
                let group = Type::group_type_builder(field.name())
                    .with_repetition(info.repetition())
                    .with_converted_type(info.converted_type())
                    .with_logical_type(info.logical_type_ref().cloned())
                    .with_fields(select(field.get_fields(), &rests)?);
                group.build().map(Arc::new).map_err(|error| error.to_string())
            }
        })
        .collect()
}

fn is_struct(field: &Type) -> bool {
    field.is_group() && field.get_basic_info().converted_type() == ConvertedType::NONE
}

/// Fails if a column has a compression that is not built in.
pub(super) fn check_codecs(group: &RowGroupMetaData) -> Result<(), String> {
    for column in group.columns() {
        let codec = match column.compression() {
            Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_) => continue,
            Compression::GZIP(_) => "gzip",
            Compression::BROTLI(_) => "brotli",
            Compression::LZO => "LZO",
            Compression::LZ4 | Compression::LZ4_RAW => "LZ4",
        };
        return Err(format!(
            "column `{}` is compressed with {codec}, which is not read: write it again with Zstandard or Snappy \
             (pyarrow: `pq.write_table(table, path, compression=\"zstd\")`)",
            column.column_path().string()
        ));
    }
    Ok(())
}
