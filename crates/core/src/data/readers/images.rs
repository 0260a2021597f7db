use std::collections::BTreeSet;
use std::fs;
use std::io::Cursor;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use image::imageops::FilterType;
use image::{ImageFormat, ImageReader, Limits};
use tch::{Kind, Tensor};

use super::file::{Fingerprint, fail};
use super::jpeg;
use crate::data::{Items, SampleRng};
use crate::{Error, Result};

/// Limit of the width and height of an image, in pixels.
const MAX_SIDE: u32 = 1 << 14;
const MAX_MEMORY: u64 = 1 << 29;
const MAX_FILE: u64 = 1 << 28;
/// Extensions of image files: those of torchvision's `ImageFolder`.
const EXTENSIONS: [&str; 9] = ["bmp", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp"];
/// Limit of the depth of folders. A deeper folder is a link that leads back.
const MAX_DEPTH: usize = 32;

/// Images in one folder per class: `<folder>/<class>/…/<name>.jpg`.
///
/// Reads the formats of torchvision's `ImageFolder`, by the extension: JPEG (`.jpg`, `.jpeg`), PNG,
/// WebP, BMP, TIFF (`.tif`, `.tiff`) and PNM (`.ppm`, `.pgm`). Other files are ignored.
///
/// Classes are numbered by name, and samples are in order of class, folder and name, like in
/// torchvision's `ImageFolder`. A sample is a uint8 tensor `[3, height, width]` and its class.
///
/// ```
/// use ice_core::data::{Dataset, Items, Labelled};
/// use ice_core::data::readers::ImageFolder;
/// # let folder = tempfile::tempdir().unwrap();
/// # let folder = folder.path();
/// # for class in ["cat", "dog"] {
/// #     std::fs::create_dir(folder.join(class)).unwrap();
/// #     image::RgbImage::new(5, 4).save(folder.join(class).join("0.png")).unwrap();
/// # }
/// let images = ImageFolder::open(folder)?.resize(224, 224);
/// assert_eq!(images.classes(), ["cat", "dog"]);
/// let dataset = images
///     .map_random(|(image, class), rng| Ok((if rng.chance(0.5) { image.flip([2]) } else { image }, class)))
///     .collate(Labelled::collate);
/// let batch = dataset.batch(&[0, 1], tch::Device::Cpu)?;
/// assert_eq!(batch.images.size(), [2, 3, 224, 224]);
/// # Ok::<(), ice_core::Error>(())
/// ```
pub struct ImageFolder {
    classes: Vec<String>,
    files: Vec<(PathBuf, i64)>,
    size: Option<(u32, u32)>,
}

impl ImageFolder {
    /// Finds the classes and files. Reads no image.
    ///
    /// # Errors
    /// [`Error::Data`] if the folder has no class, or a class has no image.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let mut classes = BTreeSet::new();
        for entry in fs::read_dir(folder).map_err(fail(folder))? {
            let path = entry.map_err(fail(folder))?.path();
            if path.is_dir() {
                let name = path.file_name().unwrap_or_default().to_str();
                classes.insert(name.ok_or_else(|| fail(&path)("its name is not UTF-8"))?.to_owned());
            }
        }
        if classes.is_empty() {
            return Err(fail(folder)("has no folder in it: each class is one"));
        }
        let mut files = Vec::new();
        for (number, class) in classes.iter().enumerate() {
            let folder = folder.join(class);
            let mut found = Vec::new();
            find(&folder, 0, &mut found)?;
            if found.is_empty() {
                return Err(fail(&folder)(format!(
                    "has no image in it: no file that ends with .{}",
                    EXTENSIONS.join(", .")
                )));
            }
            // Sorts by the path of the folder as text first, and not by its components, like
            // torchvision.
            found.sort_by(|a: &PathBuf, b| {
                let key = |path: &PathBuf| {
                    (path.parent().map(Path::as_os_str).map(ToOwned::to_owned), path.clone())
                };
                key(a).cmp(&key(b))
            });
            files.extend(found.into_iter().map(|path| (path, number as i64)));
        }
        Ok(Self { classes: classes.into_iter().collect(), files, size: None })
    }

    /// Scales each image to this size, independent of its shape.
    #[must_use]
    pub fn resize(mut self, height: u32, width: u32) -> Self {
        self.size = Some((height, width));
        self
    }

    /// Returns the names of the classes, by number.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Returns the file and class of each sample.
    pub fn files(&self) -> &[(PathBuf, i64)] {
        &self.files
    }
}

fn find(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(fail(folder)(format!("{MAX_DEPTH} folders deep: does a link lead back?")));
    }
    for entry in fs::read_dir(folder).map_err(fail(folder))? {
        let path = entry.map_err(fail(folder))?.path();
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        if path.is_dir() {
            find(&path, depth + 1, found)?;
        } else if EXTENSIONS.iter().any(|known| extension == *known) {
            found.push(path);
        }
    }
    Ok(())
}

impl Items for ImageFolder {
    type Item = (Tensor, i64);

    fn len(&self) -> usize {
        self.files.len()
    }

    fn get(&self, index: usize, _: &mut SampleRng) -> Result<(Tensor, i64)> {
        let (path, class) = &self.files[index];
        Ok((read_image(path, self.size)?, *class))
    }

    /// Returns a fingerprint of the names and the size. A file that is changed in place is not
    /// noticed.
    fn fingerprint(&self) -> u64 {
        let mut fingerprint = Fingerprint::default();
        for (path, class) in &self.files {
            fingerprint.add(path.file_name().unwrap_or_default().as_bytes());
            fingerprint.add(&class.to_le_bytes());
        }
        fingerprint.add(format!("{:?}", self.size).as_bytes());
        fingerprint.finish()
    }
}

/// Reads an image file, like [`ImageFolder`], to a uint8 tensor `[3, height, width]`, scaled to
/// `size` (height, width) if present.
///
/// # Errors
/// [`Error::Data`] if the file cannot be read, or [`decode_image`] refuses its content.
pub fn read_image(path: impl AsRef<Path>, size: Option<(u32, u32)>) -> Result<Tensor> {
    let path = path.as_ref();
    let len = fs::metadata(path).map_err(fail(path))?.len();
    if len > MAX_FILE {
        return Err(fail(path)(format!("{len} bytes are no image: more than {MAX_FILE}")));
    }
    let bytes = fs::read(path).map_err(fail(path))?;
    decode(&bytes, size).map_err(fail(path))
}

/// Decodes an image to a uint8 tensor `[3, height, width]`, scaled to `size` (height, width) if
/// present.
///
/// The formats are those of [`ImageFolder`], recognized by their content. A truncated file is an
/// error. Other damage is an error as far as the format reveals it: PNG has checksums, and JPEG
/// only codes that cannot occur.
///
/// # Errors
/// [`Error::Usage`] if it is not an image, or is damaged, larger than 16384 pixels on a side, or
/// larger than 512 MiB.
pub fn decode_image(bytes: &[u8], size: Option<(u32, u32)>) -> Result<Tensor> {
    decode(bytes, size).map_err(|problem| Error::Usage(format!("not an image that can be read: {problem}")))
}

fn decode(bytes: &[u8], size: Option<(u32, u32)>) -> Result<Tensor, String> {
    let mut reader =
        ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|error| error.to_string())?;
    // The WebP decoder replaces missing bytes at the end by zeros, so a truncated file must be
    // detected here.
    if reader.format() == Some(ImageFormat::WebP)
        && bytes[4..].first_chunk().is_some_and(|len| u32::from_le_bytes(*len) as usize > bytes.len() - 8)
    {
        return Err(format!("the WebP file of {} bytes is cut off", bytes.len()));
    }
    let image = if reader.format() == Some(ImageFormat::Jpeg) {
        jpeg::decode(bytes, MAX_SIDE, MAX_MEMORY)?
    } else {
        let mut limits = Limits::default();
        (limits.max_image_width, limits.max_image_height) = (Some(MAX_SIDE), Some(MAX_SIDE));
        limits.max_alloc = Some(MAX_MEMORY);
        reader.limits(limits);
        reader.decode().map_err(|error| error.to_string())?
    };
    let image = match size {
        Some((height, width)) => image.resize_exact(width, height, FilterType::Triangle),
        None => image,
    };
    let image = image.into_rgb8();
    let shape = [i64::from(image.height()), i64::from(image.width()), 3];
    let tensor = Tensor::f_from_data_size(image.as_raw(), &shape, Kind::Uint8);
    tensor.and_then(|tensor| tensor.f_permute([2, 0, 1])?.f_contiguous()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use image::{GrayImage, Luma, Rgb, RgbImage};

    use super::*;
    use crate::data::Pass;

    fn get(images: &ImageFolder, index: usize) -> Result<(Tensor, i64)> {
        images.get(index, &mut Pass::new(0, 0).rng(0))
    }

    #[test]
    fn classes_and_files_are_in_torchvisions_order() {
        let folder = tempfile::tempdir().unwrap();
        let image = RgbImage::from_fn(3, 2, |x, y| Rgb([x as u8, y as u8, 9]));
        let formats = ["b/3.webp", "b/4.bmp", "b/5.tif", "b/6.tiff", "b/7.ppm", "b/8.pgm"];
        let others = ["b/2.png", "b/10.jpeg", "a/z.JPG", "a/sub/0.png", "a/sub-/0.png", "B/0.png"];
        for name in formats.iter().chain(&others) {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match name.ends_with(".pgm") {
                true => image::DynamicImage::from(image.clone()).into_luma8().save(path).unwrap(),
                false => image.save(path).unwrap(),
            }
        }
        fs::write(folder.path().join("b/notes.txt"), "").unwrap();
        fs::write(folder.path().join("readme.png"), "").unwrap();
        let images = ImageFolder::open(folder.path()).unwrap();
        assert_eq!(images.classes(), ["B", "a", "b"]);
        let names: Vec<_> = images
            .files()
            .iter()
            .map(|(path, class)| (path.strip_prefix(folder.path()).unwrap().to_str().unwrap(), *class))
            .collect();
        let expected =
            [("B/0.png", 0), ("a/z.JPG", 1), ("a/sub/0.png", 1), ("a/sub-/0.png", 1), ("b/10.jpeg", 2)];
        assert_eq!(names[..5], expected);
        assert_eq!(names[6..].iter().map(|(name, _)| *name).collect::<Vec<_>>(), formats);
        for (index, (name, _)) in names.iter().enumerate().take(11).skip(5) {
            let (tensor, _) = get(&images, index).unwrap();
            assert_eq!((tensor.size(), tensor.int64_value(&[2, 1, 2])), (vec![3, 2, 3], 9), "{name}");
        }

        let (tensor, class) = get(&images, 5).unwrap();
        assert_eq!((tensor.size(), tensor.kind(), class), (vec![3, 2, 3], Kind::Uint8, 2));
        let at = |c, y, x| tensor.int64_value(&[c, y, x]);
        assert_eq!((at(0, 1, 2), at(1, 1, 2), at(2, 1, 2)), (2, 1, 9));
        assert_eq!(get(&images.resize(8, 4), 5).unwrap().0.size(), [3, 8, 4]);
    }

    #[test]
    fn grey_images_have_three_channels() {
        let mut bytes = Cursor::new(Vec::new());
        GrayImage::from_pixel(2, 2, Luma([7])).write_to(&mut bytes, ImageFormat::Png).unwrap();
        let tensor = decode_image(bytes.get_ref(), None).unwrap();
        assert_eq!((tensor.size(), tensor.sum(Kind::Int64).int64_value(&[])), (vec![3, 2, 2], 84));
    }

    #[test]
    fn damaged_and_huge_images_are_errors_that_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let open = || ImageFolder::open(folder.path()).map(|images| get(&images, 0));
        assert!(open().err().unwrap().to_string().contains("each class is one"));
        let missing = read_image(folder.path().join("missing.png"), None).unwrap_err();
        assert!(missing.to_string().contains("missing.png: No such file"), "{missing}");
        fs::create_dir(folder.path().join("a")).unwrap();
        assert!(open().err().unwrap().to_string().contains("/a: has no image"));

        for (name, format) in [
            ("x.png", ImageFormat::Png),
            ("x.jpg", ImageFormat::Jpeg),
            ("x.webp", ImageFormat::WebP),
            ("x.bmp", ImageFormat::Bmp),
            ("x.tiff", ImageFormat::Tiff),
            ("x.ppm", ImageFormat::Pnm),
        ] {
            let mut whole = Cursor::new(Vec::new());
            RgbImage::from_fn(20, 20, |x, y| Rgb([x as u8, y as u8, (x * y) as u8]))
                .write_to(&mut whole, format)
                .unwrap();
            let whole = whole.into_inner();
            let path = folder.path().join("a").join(name);
            fs::write(&path, &whole[..whole.len() / 2]).unwrap();
            let message = open().unwrap().unwrap_err().to_string();
            assert!(message.contains(name), "{message}");
            // The last four bytes of a PNG file are the checksum of the empty end chunk.
            for len in 0..whole.len() - if format == ImageFormat::Png { 4 } else { 0 } {
                assert!(decode_image(&whole[..len], None).is_err(), "{len} bytes of {name}");
            }
            for at in 0..whole.len() {
                let mut bytes = whole.clone();
                bytes[at] ^= 0x55;
                // Some damage cannot be detected.
                let _: Result<Tensor> = decode_image(&bytes, None);
            }
            fs::remove_file(path).unwrap();
        }
        // Files of headers only, which ask for more memory than the limit, or for more pixels on a
        // side.
        for [width, height] in [[15_000_u32, 15_000], [60_000, 1], [1, 60_000]] {
            let mut png = Cursor::new(Vec::new());
            RgbImage::new(1, 1).write_to(&mut png, ImageFormat::Png).unwrap();
            let mut png = png.into_inner();
            png[16..20].copy_from_slice(&width.to_be_bytes());
            png[20..24].copy_from_slice(&height.to_be_bytes());
            let crc = crc32(&png[12..29]);
            png[29..33].copy_from_slice(&crc.to_be_bytes());
            let message = decode_image(&png, None).unwrap_err().to_string();
            assert!(message.contains("limit"), "{message}");
        }
    }

    #[test]
    fn jpeg_with_codes_that_cannot_occur_is_an_error() {
        let mut whole = Cursor::new(Vec::new());
        RgbImage::from_fn(64, 64, |x, y| Rgb([(x * 3) as u8, (y * 4) as u8, (x * y) as u8]))
            .write_to(&mut whole, ImageFormat::Jpeg)
            .unwrap();
        let mut bytes = whole.into_inner();
        assert!(decode_image(&bytes, None).is_ok());
        // Sixteen one bits are not a code, and a zero must follow each byte of ones.
        let middle = bytes.len() * 2 / 3;
        bytes[middle..middle + 8].copy_from_slice(&[0xff, 0, 0xff, 0, 0xff, 0, 0xff, 0]);
        let message = decode_image(&bytes, None).unwrap_err().to_string();
        assert!(message.contains("damaged"), "{message}");
    }

    #[test]
    fn jpeg_end_marker_of_a_thumbnail_or_comment_does_not_count() {
        let mut whole = Cursor::new(Vec::new());
        RgbImage::new(9, 9).write_to(&mut whole, ImageFormat::Jpeg).unwrap();
        let whole = whole.into_inner();
        let comment = [0xff, 0xfe, 0, 6, 0xff, 0xd9, 0xff, 0xd9];
        let bytes = [&whole[..2], &comment, &whole[2..]].concat();
        assert_eq!(decode_image(&bytes, None).unwrap().size(), [3, 9, 9]);
        assert!(decode_image(&bytes[..bytes.len() - 2], None).is_err());
        // Cameras write further data after the end of the image.
        assert!(decode_image(&[&bytes[..], &[0; 9]].concat(), None).is_ok());
    }

    /// Returns the CRC of PNG's chunks.
    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0, |crc, &byte| {
            (0..8)
                .fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 })
        })
    }
}
