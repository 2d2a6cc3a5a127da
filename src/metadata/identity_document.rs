//! The instance identity document, and its signatures.

use std::collections::HashMap;
use std::sync::Mutex;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use cms::cert::{CertificateChoices, IssuerAndSerialNumber};
use cms::content_info::{CmsVersion, ContentInfo};
use cms::signed_data::{
    CertificateSet, EncapsulatedContentInfo, SignedData, SignerIdentifier, SignerInfo, SignerInfos,
};
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_RSA_SHA256, RsaKeySize, SigningKey as _, date_time_ymd};
use x509_cert::Certificate;
use x509_cert::der::asn1::{ObjectIdentifier, OctetString, SetOfVec};
use x509_cert::der::{Any, Decode as _, DecodePem as _, Encode as _};
use x509_cert::spki::AlgorithmIdentifierOwned;

use super::quoted;
use super::tree::{Facts, REGION, ZONE};
use crate::clock::rfc3339_seconds;

/// Version of the document's format, as EC2 writes it.
const VERSION: &str = "2017-09-30";

/// The document: EC2's fields in EC2's order; what a container has not is `null`, as on EC2. No last line end. `value`: what
/// the tree has at a path, so that the two always agree.
pub fn document(value: &dyn Fn(&str) -> Option<String>, facts: &Facts) -> String {
    let text = |text: String| Some(quoted(&text));
    let of = |name: &str| value(&format!("meta-data/{name}")).map(|it| quoted(&it));
    let product_codes = value("meta-data/product-codes").map(|codes| {
        let codes: Vec<_> = codes.lines().map(quoted).collect();
        format!("[ {} ]", codes.join(", "))
    });
    let fields = [
        ("accountId", text(facts.account.clone())),
        ("architecture", text(architecture().to_owned())),
        ("availabilityZone", value(ZONE).map(|it| quoted(&it))),
        ("billingProducts", None),
        ("devpayProductCodes", None),
        ("marketplaceProductCodes", product_codes),
        ("imageId", of("ami-id")),
        ("instanceId", of("instance-id")),
        ("instanceType", of("instance-type")),
        ("kernelId", of("kernel-id")),
        ("pendingTime", text(rfc3339_seconds(facts.started))),
        // Vector refuses a document in which this is not a string.
        ("privateIp", of("local-ipv4").or_else(|| text("0.0.0.0".to_owned()))),
        ("ramdiskId", of("ramdisk-id")),
        ("region", value(REGION).map(|it| quoted(&it))),
        ("version", text(VERSION.to_owned())),
    ];
    let lines: Vec<String> = fields
        .into_iter()
        .map(|(key, value)| format!("  {} : {}", quoted(key), value.unwrap_or_else(|| "null".to_owned())))
        .collect();
    format!("{{\n{}\n}}", lines.join(",\n"))
}

/// How a document is signed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SignatureFormat {
    /// The bare signature: RSA, SHA-256.
    Signature,
    /// PKCS #7 with the document in it. (EC2 signs `pkcs7` with DSA; the one key here is RSA.)
    Pkcs7,
}

/// Why there is no key to sign with.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Not made.
    #[error("no key for instance identities can be made")]
    Generate(#[source] rcgen::Error),
    /// What was kept is no key.
    #[error("expected a private key and its certificate, in PEM")]
    Key(#[source] rcgen::Error),
    /// What was kept is no certificate.
    #[error("expected a private key and its certificate, in PEM")]
    Certificate(#[source] x509_cert::der::Error),
}

/// Signs identity documents.
pub struct Signer {
    key: KeyPair,
    certificate: Certificate,
    pem: String,
    /// Signatures by document. They are made when somebody asks: most never do.
    made: Mutex<HashMap<Bytes, Bytes>>,
}

/// Signatures that are kept. A container has one document at a time.
const KEPT: usize = 1_024;
/// `BEGIN` of the certificate in what is kept.
const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";
/// Object identifiers of RFC 5652 (data, signed data), RFC 5754 (SHA-256) and RFC 8017 (RSA).
const DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.1");
const SIGNED_DATA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.7.2");
const SHA_256: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.16.840.1.101.3.4.2.1");
const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
/// Length of a line of base64, as EC2 breaks them.
const LINE: usize = 76;

impl Signer {
    /// A new key and its certificate, as they are kept: in PEM.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn generate() -> Result<String, IdentityError> {
        let make = || {
            let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048)?;
            let mut params = CertificateParams::default();
            params
                .distinguished_name
                .push(DnType::CommonName, "imds-router instance identity");
            // As long as EC2's own: whoever trusts it has it from this host, not from its dates.
            (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2195, 1, 1));
            let certificate = params.self_signed(&key)?;
            Ok(format!("{}{}", key.serialize_pem(), certificate.pem()))
        };
        make().map_err(IdentityError::Generate)
    }

    /// With what [`Self::generate`] made.
    ///
    /// # Errors
    /// When that is something else.
    pub fn new(kept: &str) -> Result<Self, IdentityError> {
        let at = kept.find(CERTIFICATE).unwrap_or(kept.len());
        let (key, pem) = kept.split_at(at);
        Ok(Self {
            key: KeyPair::from_pem(key).map_err(IdentityError::Key)?,
            certificate: Certificate::from_pem(pem).map_err(IdentityError::Certificate)?,
            pem: pem.to_owned(),
            made: Mutex::default(),
        })
    }

    /// The certificate, in PEM.
    pub fn certificate(&self) -> &str {
        &self.pem
    }

    /// A document's signature, as EC2 writes it: base64 in lines, without PEM's first and last, and without a last line end.
    /// `None`: it cannot be made.
    pub fn sign(&self, form: SignatureFormat, document: &Bytes) -> Option<Bytes> {
        let signature = self.signature(document)?;
        let bytes = match form {
            SignatureFormat::Signature => signature,
            SignatureFormat::Pkcs7 => self.pkcs7(document, signature).ok()?.into(),
        };
        let text = STANDARD.encode(bytes);
        let lines: Vec<_> = text.as_bytes().chunks(LINE).collect();
        Some(lines.join(&b'\n').into())
    }

    fn signature(&self, document: &Bytes) -> Option<Bytes> {
        let mut made = self.made.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(signature) = made.get(document) {
            return Some(signature.clone());
        }
        if made.len() >= KEPT {
            made.clear();
        }
        let signature = Bytes::from(self.key.sign(document).ok()?);
        made.insert(document.clone(), signature.clone());
        Some(signature)
    }

    /// Without signed attributes: then the signature is that of the document itself (RFC 5652, 5.4).
    fn pkcs7(&self, document: &[u8], signature: Bytes) -> x509_cert::der::Result<Vec<u8>> {
        let algorithm = |oid, parameters| AlgorithmIdentifierOwned { oid, parameters };
        let digest = algorithm(SHA_256, None);
        let own = &self.certificate.tbs_certificate;
        let signer = SignerInfo {
            version: CmsVersion::V1,
            sid: SignerIdentifier::IssuerAndSerialNumber(IssuerAndSerialNumber {
                issuer: own.issuer.clone(),
                serial_number: own.serial_number.clone(),
            }),
            digest_alg: digest.clone(),
            signed_attrs: None,
            signature_algorithm: algorithm(RSA, Some(Any::null())),
            signature: OctetString::new(signature)?,
            unsigned_attrs: None,
        };
        let content = OctetString::new(document)?;
        let certificates = SetOfVec::try_from(vec![CertificateChoices::Certificate(self.certificate.clone())])?;
        let signed = SignedData {
            version: CmsVersion::V1,
            digest_algorithms: SetOfVec::try_from(vec![digest])?,
            encap_content_info: EncapsulatedContentInfo {
                econtent_type: DATA,
                econtent: Some(Any::from_der(&content.to_der()?)?),
            },
            certificates: Some(CertificateSet(certificates)),
            crls: None,
            signer_infos: SignerInfos(SetOfVec::try_from(vec![signer])?),
        };
        let info = ContentInfo {
            content_type: SIGNED_DATA,
            content: Any::from_der(&signed.to_der()?)?,
        };
        info.to_der()
    }
}

/// This machine's architecture as EC2 names it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        "x86" => "i386",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tree::tests::facts;
    use super::super::{Node, tree};
    use super::*;

    fn tree() -> impl Fn(&str) -> Bytes {
        let view = tree::View::of(facts());
        move |name| match view.get(&format!("dynamic/instance-identity/{name}")) {
            Some(Node::Text(text)) => text.clone(),
            other => panic!("{name}: {other:?}"),
        }
    }

    #[test]
    fn the_document_is_json_with_ec2s_fields_in_ec2s_order() {
        let text = String::from_utf8(tree()("document").to_vec()).unwrap();
        assert!(
            text.starts_with("{\n  \"accountId\" : \"123456789012\",\n  \"architecture\" : "),
            "{text}"
        );
        assert!(
            text.ends_with("  \"region\" : \"us-east-1\",\n  \"version\" : \"2017-09-30\"\n}"),
            "{text}"
        );
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(read["privateIp"], "172.17.5.5");
        assert_eq!(read["pendingTime"], "2026-01-05T10:04:05Z");
        assert!(read["kernelId"].is_null());
    }

    #[test]
    fn a_signature_is_lines_of_76_and_the_same_for_the_same_document() {
        let kept = Signer::generate().unwrap();
        let signer = Signer::new(&kept).unwrap();
        let document = tree()("document");
        for form in [SignatureFormat::Signature, SignatureFormat::Pkcs7] {
            let signed = signer.sign(form, &document).unwrap();
            let again = Signer::new(&kept).unwrap().sign(form, &document).unwrap();
            assert_eq!(signed, again);
            let text = String::from_utf8(signed.to_vec()).unwrap();
            assert!(
                !text.ends_with('\n') && text.lines().all(|line| line.len() <= 76),
                "{text}"
            );
            assert_ne!(signer.sign(form, &Bytes::from_static(b"{}")).unwrap(), signed);
        }
        assert!(Signer::new("").is_err());
        assert!(Signer::new(signer.certificate()).is_err());
    }
}
