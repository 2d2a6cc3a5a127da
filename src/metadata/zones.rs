//! The names of zones: Availability Zones (`us-east-1a`), Local Zones (`us-west-2-lax-1a`) and Wavelength Zones
//! (`us-east-1-wl1-bos-wlz-1`). See the EC2 user guide, "Regions and Zones".

/// The name of a zone, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Zone<'a> {
    region: &'a str,
    kind: Kind<'a>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind<'a> {
    /// Its letter.
    Availability(u8),
    /// City, number and letter: `lax`, `1`, `a`.
    Local(&'a str, &'a str, u8),
    /// Group, city and number: `wl1`, `bos`, `1`.
    Wavelength(&'a str, &'a str, &'a str),
}

/// The region of a zone. `None`: the text is not the name of a zone.
pub fn region_of(zone: &str) -> Option<&str> {
    parse(zone).map(|zone| zone.region)
}

/// The id of a zone: `use1-az1`, `usw2-lax1-az1`, `use1-wl1-bos-wlz1`. In each account of AWS the letters stand for other ids; here
/// `a` is 1 in each.
pub fn id(zone: &str) -> Option<String> {
    let zone = parse(zone)?;
    let region = short(zone.region)?;
    let number = |letter: u8| letter - b'a' + 1;
    Some(match zone.kind {
        Kind::Availability(letter) => format!("{region}-az{}", number(letter)),
        Kind::Local(city, group, letter) => format!("{region}-{city}{group}-az{}", number(letter)),
        Kind::Wavelength(group, city, last) => format!("{region}-{group}-{city}-wlz{last}"),
    })
}

fn parse(zone: &str) -> Option<Zone<'_>> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let letters = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase());
    let with_letter = |text: &str| {
        let letter = *text.as_bytes().last().filter(|b| b.is_ascii_lowercase())?;
        digits(&text[..text.len() - 1]).then_some(letter)
    };
    // A region ends with its first number.
    let parts: Vec<&str> = zone.split('-').collect();
    let words = parts.iter().take_while(|part| letters(part)).count();
    let (number, rest) = parts.get(words..)?.split_first()?;
    if words < 2 {
        return None;
    }
    let until_number = parts[..words].iter().map(|word| word.len() + 1).sum::<usize>();
    let is_city = |text: &str| text.len() == 3 && letters(text);
    let is_group = |text: &str| text.strip_prefix("wl").is_some_and(digits);
    let (region_end, kind) = match rest {
        [] => (zone.len() - 1, Kind::Availability(with_letter(number)?)),
        _ if !digits(number) => return None,
        [city, last] if is_city(city) => {
            let letter = with_letter(last)?;
            let kind = Kind::Local(city, &last[..last.len() - 1], letter);
            (until_number + number.len(), kind)
        }
        [group, city, "wlz", last] if is_group(group) && is_city(city) && digits(last) => {
            (until_number + number.len(), Kind::Wavelength(group, city, last))
        }
        _ => return None,
    };
    Some(Zone {
        region: &zone[..region_end],
        kind,
    })
}

/// A region as ids of zones have it: `use1`, `apse2`, `usgw1`, `usibe1`.
fn short(region: &str) -> Option<String> {
    let (words, number) = region.rsplit_once('-')?;
    let words = words.split('-').enumerate().map(|(at, word)| match (at, word) {
        // `us`, `eu`, `eusc`.
        (0, word) => word,
        (_, "northeast") => "ne",
        (_, "northwest") => "nw",
        (_, "southeast") => "se",
        (_, "southwest") => "sw",
        // The isolated partitions: `isob` of us-isob-east-1 is `ib`. That of aws-iso itself is `i`.
        (_, "isob") => "ib",
        (_, "isoe") => "ie",
        (_, "isof") => "if",
        (_, word) => &word[..1],
    });
    Some(words.chain([number]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_zones_are_as_aws_writes_them() {
        for (zone, region, id_of_zone) in [
            ("us-east-1a", "us-east-1", "use1-az1"),
            ("eu-central-1c", "eu-central-1", "euc1-az3"),
            ("ap-southeast-2b", "ap-southeast-2", "apse2-az2"),
            ("ap-northeast-1a", "ap-northeast-1", "apne1-az1"),
            ("us-gov-west-1a", "us-gov-west-1", "usgw1-az1"),
            ("cn-northwest-1a", "cn-northwest-1", "cnnw1-az1"),
            ("il-central-1a", "il-central-1", "ilc1-az1"),
            ("us-iso-east-1a", "us-iso-east-1", "usie1-az1"),
            ("us-isob-east-1a", "us-isob-east-1", "usibe1-az1"),
            ("us-west-2-lax-1a", "us-west-2", "usw2-lax1-az1"),
            ("us-west-2-lax-1b", "us-west-2", "usw2-lax1-az2"),
            ("us-east-1-dfw-2a", "us-east-1", "use1-dfw2-az1"),
            ("us-east-1-wl1-bos-wlz-1", "us-east-1", "use1-wl1-bos-wlz1"),
            ("eu-west-2-wl2-man-wlz-1", "eu-west-2", "euw2-wl2-man-wlz1"),
        ] {
            assert_eq!(region_of(zone), Some(region), "{zone}");
            assert_eq!(id(zone).as_deref(), Some(id_of_zone));
        }
    }

    #[test]
    fn other_texts_are_no_zones() {
        for text in [
            "",
            "-",
            "a",
            "us-east-1",
            "us-east-a",
            "east-1a",
            "us-east-1aa",
            "us-east-1A",
            "us-east-1-a",
            "us-east-1a-lax-1a",
            "us-west-2-lax-1",
            "us-west-2-lax-a",
            "us-west-2-la-1a",
            "us-west-2-lax-",
            "us-east-1-wl1-bos-wlz-a",
            "us-east-1-wl-bos-wlz-1",
            "us-east-1-xx1-bos-wlz-1",
            "us-east-1-wl1-bos-wlz-1-1",
            "us--east-1a",
            "üs-east-1a",
            "us-east-1ü",
        ] {
            assert_eq!(region_of(text), None, "{text}");
            assert_eq!(id(text), None, "{text}");
        }
    }
}
